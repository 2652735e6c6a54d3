"""Folders for work in progress, each locked by one process.

Folders that a killed process leaves behind are removed by the next process that sweeps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prefixfast.io.atomic import PATIENCE, STALE_SECONDS

if sys.platform != "win32":
    import fcntl

NAME = re.compile(r"[0-9a-f]{16}")  # names of the folders
LOCKED = (errno.EACCES, errno.EAGAIN)  # errors of a lock that another process has


@contextlib.contextmanager
def workspace(root: Path) -> Iterator[Path]:
    """Context manager of a new folder in ``root``, which is removed at the end.

    `sweep` leaves the folder alone as long as this process lives.

    Example:
        >>> import tempfile
        >>> with workspace(Path(tempfile.mkdtemp()) / "work") as folder:
        ...     (folder / "file").write_text("half")
        4

    Args:
        root: Folder for workspaces only; created if it does not exist.

    Yields:
        New folder.

    Raises:
        OSError: If the folder cannot be created.
    """
    root.mkdir(exist_ok=True)
    folder, fd = new_locked(root, lambda: secrets.token_hex(8))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock(fd)


@contextlib.contextmanager
def atomic_removal(folder: Path, root: Path) -> Iterator[Path]:
    """Context manager that moves a folder to ``root`` by one rename, and removes it at the end.

    The rename makes all files disappear from their path at once, and needs no space on a full disk.

    Args:
        folder: Folder to remove.
        root: Folder for workspaces only; created if it does not exist.

    Yields:
        New path of the folder.

    Raises:
        FileNotFoundError: If the folder does not exist, or another process is removing it.
        OSError: If a file cannot be removed; the next `sweep` tries again.
    """
    root.mkdir(exist_ok=True)
    try:
        fd = _lock_current(folder)
    except BlockingIOError as e:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder)) from e
    gone = root / secrets.token_hex(8)
    try:
        if fd is None:
            os.utime(folder)  # without a lock, sweep goes by the age
        folder.rename(gone)
        yield gone
        _remove(gone)
    finally:
        unlock(fd)


def sweep(root: Path) -> int:
    """Remove the folders in ``root`` whose processes have ended.

    Returns:
        Number of removed folders.
    """
    swept = 0
    with contextlib.suppress(FileNotFoundError):
        for folder in root.iterdir():
            if NAME.fullmatch(folder.name):
                with contextlib.suppress(OSError):  # in use, or removed by another process
                    swept += _sweep(folder)
    return swept


def _sweep(folder: Path) -> bool:
    fd = lock(folder)
    try:
        if fd is None and time.time() - folder.stat().st_mtime < STALE_SECONDS:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        unlock(fd)
    return not folder.exists()


def _lock_current(folder: Path) -> int | None:
    """Lock the folder that a path leads to now, as `lock` does.

    Between opening and locking, another process can remove the folder and a third one can make a new folder of the same
    path. A lock of the removed folder protects nothing.
    """
    while True:
        fd = lock(folder)
        try:
            if fd is None or os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        except BaseException:
            unlock(fd)
            raise
        unlock(fd)


def _remove(folder: Path) -> None:
    """Remove a folder; a version that a writer was moving into it just before is removed too."""
    for attempt in range(PATIENCE):
        try:
            shutil.rmtree(folder)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt + 1 == PATIENCE:
                raise
        else:
            return


def new_locked(root: Path, make_name: Callable[[], str]) -> tuple[Path, int | None]:
    """Make a folder and lock it.

    Args:
        root: Folder of the new folder.
        make_name: Function that makes a new name at each call.

    Returns:
        New folder, and the descriptor of its lock as of `lock`.
    """
    while True:
        folder = root / make_name()
        folder.mkdir()
        try:
            fd = lock(folder)
        except (FileNotFoundError, BlockingIOError):  # another process swept the folder before it was locked
            continue
        if folder.exists():
            return folder, fd
        unlock(fd)


def lock(folder: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends.

    Args:
        folder: Folder to lock.
        shared: Whether other processes can have the lock too, if they share it.
        wait: Whether to wait while another process has the lock.

    Returns:
        Descriptor of the lock, None where folders cannot be locked (Windows, some network file systems).

    Raises:
        BlockingIOError: If another process has the lock, without ``wait``.
        OSError: If the folder does not exist.
    """
    if sys.platform == "win32":
        return None
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        os.close(fd)
        if e.errno in LOCKED:
            raise BlockingIOError(e.errno, e.strerror) from e
        return None
    return fd


def unlock(fd: int | None) -> None:
    """Give up a lock; None is that of a folder that cannot be locked."""
    if fd is not None:
        os.close(fd)
