"""`Progress`, which reports long work: as a bar on a terminal or in a notebook, as a line every 10 s elsewhere.

A thread writes the reports, so that also work without units, such as loading a base model, is reported in time. The
thread that works only counts: it waits for no device and no output.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TypeVar

from prefixfast.io.text import duration, rate

LINE_SECONDS = 10.0  # between two lines
BAR_SECONDS = 0.5  # between two states of a bar, and before a bar appears, so that short work shows none
T = TypeVar("T")

_wanted: ContextVar[bool | None] = ContextVar("prefixfast_progress_wanted", default=None)
_current: ContextVar[Progress | None] = ContextVar("prefixfast_progress", default=None)


@contextlib.contextmanager
def show_progress(wanted: bool | None) -> Iterator[None]:
    """Context manager that sets how the work inside is reported.

    Args:
        wanted: Whether reports are shown. True shows bars even if standard error is no terminal, False shows nothing.
            None keeps the setting around it, which without one is a bar on a terminal or in a notebook, and lines
            elsewhere.
    """
    token = _wanted.set(_wanted.get() if wanted is None else wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


class Progress:
    """Context manager that reports how far some work is. Inside it another one can report a part of the work.

    Args:
        label: Work, for example ``"train"``.
        total: Number of units, None if the work has none; then the time that it takes is reported.
        unit: Name of the units in the plural.
        initial: Number of units that an earlier run has finished.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "",
        *,
        initial: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit, self.initial, self.clock = label, total, unit, initial, clock
        self.done = initial
        self.amounts: dict[str, float] = {}
        self.details: Callable[[], str] = str  # text of what a report also says, such as a loss
        self._start = self._last = 0.0
        self._interval = LINE_SECONDS
        self._has_bar = self._is_shown = False
        self._part: Progress | None = None  # part of the work that runs now
        self._bar: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def update(self, count: int = 1, **amounts: float) -> None:
        """Count finished units.

        Args:
            count: Number of units.
            amounts: Finished amounts of which reports say the rate, for example ``tokens=512``.
        """
        self.done += count
        for name, amount in amounts.items():
            self.amounts[name] = self.amounts.get(name, 0) + amount

    def tick(self) -> None:
        """Report now if a report is due."""
        now = self.clock()
        is_reported = self._part is not None and self._part._is_shown
        if self._thread is None or is_reported or now - self._last < self._interval:
            return
        self._last = now
        self._is_shown = True
        if self._has_bar:
            self._show_bar()
        else:
            _write(self._line())

    def _line(self) -> str:
        """Report as one line of text."""
        seconds = self.clock() - self._start
        count, left, own = "", f"{duration(seconds)} so far", self.done - self.initial
        if self.total is not None:
            count = f"{self.done} of {self.total} {self.unit}"
            if own > 0 and self.done < self.total:
                left = f"{duration(seconds * (self.total - self.done) / own)} left"
        return f"{self.label}: " + ", ".join(p for p in (count, self._text(), left) if p)

    def _text(self) -> str:
        """Details and rates."""
        seconds = max(self.clock() - self._start, 1e-9)
        rates = (f"{rate(amount / seconds)} {name}/s" for name, amount in list(self.amounts.items()))
        return ", ".join(p for p in (self.details(), *rates) if p)

    def _show_bar(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # as in _write
            self._draw_bar()

    def _draw_bar(self) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm

            form = "{desc} [{elapsed}]{postfix}" if self.total is None else None
            self._bar = tqdm(
                total=self.total,
                initial=self.initial,
                desc=self.label,
                unit=f" {self.unit}",
                leave=self._outer is None and self.total is not None,
                bar_format=form,
            )
            self._bar.start_t -= self.clock() - self._start
        self._bar.n = self.done
        self._bar.set_postfix_str(self._text())

    def __enter__(self) -> Self:
        self._has_bar = draws_bars()
        self._interval = BAR_SECONDS if self._has_bar else LINE_SECONDS
        self._start = self._last = self.clock()
        self._outer = _current.get()
        if self._outer is not None:
            self._outer._part = self
        self._token = _current.set(self)
        if _wanted.get() is not False and sys.stderr is not None:
            self._thread = threading.Thread(target=self._run, name="prefixfast-progress", daemon=True)
            self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.tick()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop.set()
            if self._thread is not None:
                self._thread.join()
            self._report_end(is_finished=kind is None)
        finally:  # also after Ctrl-C during the end itself
            _current.reset(self._token)
            if self._outer is not None:
                self._outer._part = None

    def _report_end(self, *, is_finished: bool) -> None:
        if self._bar is not None:
            self._show_bar()
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()
        elif self._is_shown and is_finished:
            count = "" if self.total is None else f"{self.done} of {self.total} {self.unit}"
            spent = f"finished after {duration(self.clock() - self._start)}"
            _write(f"{self.label}: " + ", ".join(p for p in (count, self._text(), spent) if p))


@contextlib.contextmanager
def track(items: Iterable[T], label: str, total: int, unit: str) -> Iterator[Iterator[T]]:
    """Context manager of an iterator over items that reports how many of them are finished.

    An error in the work on an item ends the reports, also while its traceback is kept.

    Args:
        items: Items.
        label: Work on the items.
        total: Number of items.
        unit: Name of the items in the plural.
    """
    with Progress(label, total, unit) as progress:

        def each() -> Iterator[T]:
            for item in items:
                yield item
                progress.update()

        yield each()


def draws_bars() -> bool:
    """Whether progress is shown as bars: on a terminal, in a notebook with widgets, or where they are asked for."""
    wanted = _wanted.get()
    return _is_terminal() if wanted is None else wanted


def _is_terminal() -> bool:
    """Whether a bar can be drawn: on a terminal, or in a notebook with widgets."""
    with contextlib.suppress(ValueError):  # of a standard error that was closed
        if sys.stderr is not None and sys.stderr.isatty():
            return True
    if "ipykernel" not in sys.modules:
        return False
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    return issubclass(tqdm, tqdm_notebook)


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a standard error that was closed does not end the work
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
