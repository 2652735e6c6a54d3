"""`BaseGuard`, which keeps changes of a base model's weights and runs of other threads apart.

Any number of threads run a base model at the same time. Trained weights change it for all of them, so that the thread
that puts them in waits until no other thread runs the model. The others then wait until the model is as it was. Threads
get in in the order in which they ask.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

from prefixfast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class _Hold:
    """Use of the base model by a thread, which waits for it or has it."""

    thread: int
    is_exclusive: bool
    is_active: bool = False


class BaseGuard:
    """Guard of one Hugging Face model, which all `Model` objects of it share.

    Attributes:
        acting: Places, shapes and dtypes of the tensors that act in the base model now, None for its own weights alone.
        num_engines: Number of engines with a thread of their own that use the base model.
        trainings: Ids of the threads whose training runs change the base model.
        is_torn: Whether this process was forked while another thread had changed the base model.
    """

    def __init__(self) -> None:
        self.acting: tuple[object, ...] | None = None
        self.num_engines = 0
        self.trainings: list[int] = []
        self.is_torn = False
        self._holds: list[_Hold] = []  # in the order in which they were asked for
        self._reset_lock()
        _GUARDS.add(self)

    @property
    def is_awaited(self) -> bool:
        """Whether a thread waits for the base model."""
        return not all(hold.is_active for hold in tuple(self._holds))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context manager in which the base model runs and no other thread changes it.

        It can be left by another thread than the one that entered it.

        Raises:
            ConfigError: In a process that was forked while the base model was changed.
        """
        if self._own() is not None:
            yield
            return
        with self._hold(is_exclusive=False):
            yield

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Context manager in which this thread changes the base model and no other thread runs it.

        Raises:
            ConfigError: If this thread runs the base model, or an engine with a thread of its own uses it.
        """
        own = self._own()
        if own is not None and own.is_exclusive:
            yield
            return
        if own is not None:
            msg = (
                "trained weights change the base for all requests, and this call comes from a logits processor or a "
                "callback inside a run of the base; call it after the run, or load the base again for the weights"
            )
            raise ConfigError(msg)
        with self._hold(is_exclusive=True):
            yield

    @contextlib.contextmanager
    def acting_until(self, restore: Callable[[], None], tensors: Iterable[Tensor] = ()) -> Iterator[None]:
        """Context manager at whose end a changed base model is given back.

        If the restoring is interrupted, every later use of the base model is refused.

        Args:
            restore: Function that gives the base model back.
            tensors: Tensors that act in the base model until then.
        """
        self.acting = tuple((t.data_ptr(), tuple(t.shape), t.dtype) for t in tensors)
        try:
            yield
        finally:
            restore()
            self.acting = None

    def check_unchanged(self) -> None:
        """Raise `ConfigError` if trained weights act in the base model, for the thread that runs or changes it."""
        if self.acting is not None:
            msg = (
                "trained weights act in this base in this thread, so that prefixes and other weights do not fit it; "
                "call it after their run, or load the base again"
            )
            raise ConfigError(msg)

    def check_not_changing(self) -> None:
        """Raise `ConfigError` if this thread has put trained weights into the base model.

        Threads of engines wait for their end, and other calls would run with them.
        """
        own = self._own()
        if own is not None and own.is_exclusive:
            msg = (
                "trained weights act in this base until the call that put them in ends, and this call comes from a "
                "logits processor or a callback inside it; load the base again for this call, or make it afterwards"
            )
            raise ConfigError(msg)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Context manager of a training run that changes the base model in its steps.

        Raises:
            ConfigError: If an engine with a thread of its own uses the base model.
        """
        with self._lock:
            self._check_no_engine()
            self.trainings.append(me := threading.get_ident())
        try:
            yield
        finally:
            with self._lock:
                self.trainings.remove(me)

    def add_engine(self) -> None:
        """Note an engine with a thread of its own, whose requests need not end.

        Raises:
            ConfigError: If a training run changes the base model, or this thread does, for which the engine would wait.
        """
        own = self._own()
        with self._lock:
            if self.trainings or (own is not None and own.is_exclusive):
                msg = (
                    "submit, stream and agenerate start a thread of the engine, which cannot run while trained weights "
                    "act in this base or are in training; load the base again for this engine, or wait for the end"
                )
                raise ConfigError(msg)
            self.num_engines += 1
            self._changed.notify_all()

    def remove_engine(self) -> None:
        """Note that the thread of an engine has ended."""
        with self._lock:
            self.num_engines -= 1

    def _check_no_engine(self) -> None:
        if self.num_engines:
            msg = (
                "trained weights change the base for all requests, and an engine with a thread of its own (submit, "
                "stream, agenerate) uses this base; close that engine, or load the base again for the weights"
            )
            raise ConfigError(msg)

    def _own(self) -> _Hold | None:
        """The first active hold of this thread, None without one."""
        me = threading.get_ident()
        with self._lock:
            return next((hold for hold in self._holds if hold.thread == me and hold.is_active), None)

    @contextlib.contextmanager
    def _hold(self, *, is_exclusive: bool) -> Iterator[None]:
        """Context manager of a new hold, which waits for those before it that exclude it."""
        hold = _Hold(threading.get_ident(), is_exclusive)
        try:
            with self._lock:
                self._holds.append(hold)
                while not self._is_due(hold):
                    self._changed.wait()
                hold.is_active = True
            yield
        finally:
            with self._lock:
                if hold in self._holds:  # not after an interrupt or a fork
                    self._holds.remove(hold)
                self._changed.notify_all()

    def _is_due(self, hold: _Hold) -> bool:
        """Whether a hold need not wait any more."""
        if self.is_torn:
            msg = (
                "this process was forked while another thread had trained weights in this base; load it again, or "
                "start processes with 'spawn'"
            )
            raise ConfigError(msg)
        if self.acting is not None and not any(other.is_exclusive and other.is_active for other in self._holds):
            msg = "an interrupt left trained weights in this base while they were taken out; load it again"
            raise ConfigError(msg)
        if hold.is_exclusive:
            self._check_no_engine()
        # A signal handler can ask while its own thread waits.
        before = [other for other in self._holds[: self._holds.index(hold)] if other.thread != hold.thread]
        return not any(hold.is_exclusive or other.is_exclusive for other in before)

    def _reset_lock(self) -> None:
        # An interrupt in a with statement of a lock releases it, in one of a condition it can leave it taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def _after_fork(self) -> None:
        """Forget the threads of the parent process."""
        me = threading.get_ident()
        self.is_torn |= any(h.is_exclusive and h.is_active and h.thread != me for h in self._holds)
        self._holds = [hold for hold in self._holds if hold.thread == me]
        self.trainings = [thread for thread in self.trainings if thread == me]
        self.num_engines = 0
        self._reset_lock()


_GUARDS: WeakSet[BaseGuard] = WeakSet()


def _after_fork() -> None:
    for guard in list(_GUARDS):
        guard._after_fork()


os.register_at_fork(after_in_child=_after_fork)
