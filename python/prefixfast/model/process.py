"""The process: its forks, and its end while threads still run the model.

Threads and locks of a process do not run in a child after ``fork``, so an object with a thread refuses to work there. A
thread that is inside torch while the interpreter ends would crash the process, so all of them are stopped before.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from typing import Protocol
from weakref import WeakSet

import torch

from prefixfast.errors import ConfigError

logger = logging.getLogger(__name__)
EXIT_SECONDS = 10.0  # longest wait for one thread at the end of the process, for example for a user's callback
process_id = os.getpid


class HasThread(Protocol):
    """Object with a thread of its own."""

    def end(self, timeout: float | None = None) -> None:
        """End the thread.

        Args:
            timeout: Largest number of seconds to wait, None without a limit.
        """


class _State:
    """State of this process.

    Attributes:
        exiting: Whether the interpreter ends.
        computed: Whether a model was attached, so that OpenMP may have threads.
        forked: Whether this is a child that was forked after its parent had computed.
    """

    exiting = computed = forked = False


_THREADS: WeakSet[HasThread] = WeakSet()
_LOCKS: WeakSet[threading.Lock] = WeakSet()


def check_same_process(made_in: int, what: str) -> None:
    """Raise `ConfigError` in a child process that was forked after an object was made.

    Args:
        made_in: Id of the process that made the object.
        what: Kind of the object, for the error.
    """
    if made_in != os.getpid():
        msg = (
            f"this {what} was made by process {made_in} and its threads do not run in the forked process "
            f"{os.getpid()}; make a new one here, or start processes with 'spawn'"
        )
        raise ConfigError(msg)


def note_computing() -> None:
    """Note that this process computes with a model."""
    _State.computed = True


def check_num_threads(count: int | None) -> None:
    """Raise `ConfigError` if a forked process is asked for several CPU threads, which would hang.

    Args:
        count: Number of threads, None for torch's setting.
    """
    if _State.forked and (count or torch.get_num_threads()) > 1:
        msg = (
            f"num_threads: expected 1 in a process that was forked after its parent had used a model, got "
            f"{count or torch.get_num_threads()}, since OpenMP's threads do not survive a fork; start processes with "
            "'spawn' to use more"
        )
        raise ConfigError(msg)


def check_not_exiting() -> None:
    """End the thread with `SystemExit`, which is not reported, if the interpreter ends. To be called between steps."""
    if _State.exiting:
        raise SystemExit


def model_lock() -> threading.Lock:
    """A lock that is held while its owner runs a model. The end of the process waits for it."""
    lock = threading.Lock()
    _LOCKS.add(lock)
    return lock


def end_at_exit(owner: HasThread) -> None:
    """End a thread before the interpreter ends.

    Args:
        owner: Owner of the thread.
    """
    _THREADS.add(owner)


@atexit.register
def _end_threads() -> None:
    """Stop all threads that run models, then those that the stopped ones wait for."""
    _State.exiting = True
    late = False
    for lock in list(_LOCKS):
        # Whoever gets the lock next meets `check_not_exiting`.
        if lock.acquire(timeout=EXIT_SECONDS):
            lock.release()
        else:
            late = True
    for owner in list(_THREADS):
        try:
            owner.end(EXIT_SECONDS)
        except Exception:
            logger.exception("a thread could not be ended")
    if late:
        logger.warning("the process ends while a thread is still inside a model's step")


def _after_fork() -> None:
    """Prepare a child process, which has none of its parent's threads."""
    _THREADS.clear()
    _LOCKS.clear()
    if _State.computed:
        _State.forked = True
        # A parallel region would wait for the parent's OpenMP threads for ever.
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)
