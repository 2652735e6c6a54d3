"""Folders for work in progress that survive nobody: each is locked by one process, and what a killed one leaves is removed by the next."""

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

from prefixfast.io.atomic import STALE_SECONDS

if sys.platform != "win32":
    import fcntl

OURS = re.compile(r"[0-9a-f]{16}")
BUSY = (errno.EACCES, errno.EAGAIN)


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
    folder, fd = _locked(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _close(fd)


@contextlib.contextmanager
def taken_away(folder: Path, root: Path) -> Iterator[Path]:
    """A folder under another path, in ``root``, and removed at the end: all of it is gone at once. It takes no room on a full disk.

    Raises:
        FileNotFoundError: If it is not there, or somebody else is taking it away.
        OSError: If something of it cannot be removed; `sweep` will try again.
    """
    root.mkdir(exist_ok=True)
    try:
        fd = _hold(folder)
    except BlockingIOError as e:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder)) from e
    gone = root / secrets.token_hex(8)
    try:
        if fd is None:
            os.utime(folder)  # where nothing can be locked, age protects it
        folder.rename(gone)
        yield gone
        shutil.rmtree(gone)
    finally:
        _close(fd)


def sweep(root: Path) -> int:
    """Remove the folders in ``root`` whose processes are gone, however they went; returns how many."""
    swept = 0
    with contextlib.suppress(FileNotFoundError):
        for folder in root.iterdir():
            if OURS.fullmatch(folder.name):
                with contextlib.suppress(OSError):  # in use, or another sweeper was faster
                    swept += _sweep(folder)
    return swept


def _sweep(folder: Path) -> bool:
    fd = _hold(folder)
    try:
        if fd is None and time.time() - folder.stat().st_mtime < STALE_SECONDS:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        _close(fd)
    return not folder.exists()


def _locked(root: Path) -> tuple[Path, int | None]:
    while True:
        folder = root / secrets.token_hex(8)
        folder.mkdir()
        try:
            fd = _hold(folder)
        except (FileNotFoundError, BlockingIOError):  # swept before it was locked
            continue
        if folder.exists():
            return folder, fd
        _close(fd)


def _hold(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None where folders cannot be locked (Windows, some network file systems).

    Raises:
        BlockingIOError: If another process holds it.
        OSError: If it is not there.
    """
    if sys.platform == "win32":
        return None
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        if e.errno in BUSY:
            raise BlockingIOError(e.errno, e.strerror) from e
        return None
    return fd


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
