"""Freed memory that the C library keeps for the next allocation instead of giving it back to the system.

By default glibc gives large blocks back as soon as they are free. The activations of the next training step then fault
in page by page. glibc keeps large blocks of the main thread only: a block of 64 MiB of another thread is mapped alone
whatever the thresholds are.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Parameters of mallopt in glibc: size of the free memory at the end of the heap above which it is given back, and size
# of a block from which on it is mapped alone.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**31 - 1, 2**30
# Where glibc's own adjustment ends in a process that has freed blocks of 32 MiB, which is over once mallopt is called.
DEFAULTS = 2**26, 2**25

_lock = threading.Lock()
_users = 0


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory of the whole process, until the last of all blocks under this manager ends. glibc only."""
    hold()
    try:
        yield
    finally:
        release()


def hold() -> None:
    """Begin to keep freed memory. Each call needs a `release`."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set(*LARGEST_KEPT)


def release() -> None:
    """End one `hold`. The last one gives the free memory back to the system."""
    global _users
    with _lock:
        _users -= 1
        if not _users and _set(*DEFAULTS):
            _glibc("malloc_trim")(0)


def _set(trim: int, mmap: int) -> bool:
    """Set both thresholds in bytes; False where there is no mallopt."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    mallopt = _glibc("mallopt")
    mallopt(TRIM_THRESHOLD, trim)
    if not mallopt(MMAP_THRESHOLD, mmap):  # older versions of glibc take at most 32 MiB
        mallopt(MMAP_THRESHOLD, DEFAULTS[1])
    return True


@functools.cache
def _glibc(name: str) -> Callable[..., int]:
    function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    return function
