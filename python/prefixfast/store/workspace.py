"""Folders for work in progress that survive nobody: each belongs to one writer, and what a killed writer leaves is removed by the next one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from prefixfast.files import STALE_SECONDS

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = re.compile(r"[0-9a-f]{16}\.lock")
BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def workspace(root: Path) -> Iterator[Path]:
    """A new folder in ``root``, removed at the end; `sweep` leaves it alone for as long as this process lives.

    Example:
        >>> import tempfile
        >>> with workspace(Path(tempfile.mkdtemp()) / "work") as folder:
        ...     (folder / "file").write_text("half")
        4

    Args:
        root: A folder for nothing else; made if it is not there.

    Raises:
        OSError: If the disk refuses.
    """
    root.mkdir(exist_ok=True)
    lock, fd = _locked(root)
    folder = lock.with_suffix("")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)
        if not folder.exists():  # else the lock says that there is something to sweep
            lock.unlink(missing_ok=True)


def sweep(root: Path) -> int:
    """Remove the folders in ``root`` whose writers are gone, however they went; returns how many."""
    swept = 0
    with contextlib.suppress(FileNotFoundError):
        for path in root.iterdir():
            if LOCK.fullmatch(path.name):
                with contextlib.suppress(OSError):  # its writer, or another sweeper, was faster
                    swept += _sweep(path)
    return swept


def _sweep(lock: Path) -> bool:
    fd = os.open(lock, os.O_RDWR)
    try:
        free = _try_lock(fd)
        if free is None:  # a file system without locks: by age
            free = time.time() - os.fstat(fd).st_mtime > STALE_SECONDS
        if free:
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    finally:
        os.close(fd)
    if free and not lock.with_suffix("").exists():
        lock.unlink()
        return True
    return False


def _locked(root: Path) -> tuple[Path, int]:
    """A new lock file, locked before its folder exists, so that no folder is ever without its lock."""
    while True:
        path = root / f"{secrets.token_hex(8)}.lock"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if _try_lock(fd) is not False and path.exists():
            return path, fd
        os.close(fd)  # swept between the two calls


def _try_lock(fd: int) -> bool | None:
    """Lock a file for as long as this process holds it open; None where the file system cannot."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return False if e.errno in BUSY else None
    return True
