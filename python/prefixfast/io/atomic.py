"""Atomic writes of files and folders: written beside the target, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefixfast.errors import PrefixFastError

T = TypeVar("T")
PATIENCE = 20  # attempts of a rename or read that other processes disturb
STALE_SECONDS = 600  # age of a temporary folder whose writer is taken to be dead


def write_file(path: Path, data: bytes) -> None:
    """Write and sync one new file; a crash can leave part of it."""
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically, in place of an existing file; missing parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(fd)
    temporary = Path(name)
    try:
        temporary.unlink()
        write_file(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_folder(target: Path, write: Callable[[Path], None], *, owned: frozenset[str]) -> None:
    """Write a folder in place of an existing one; at every moment the old or the new version is complete on disk.

    Args:
        target: Folder to write; missing parents are created.
        write: Function that writes files into the empty folder that it gets.
        owned: Names of files that belong to the written data; files of the existing folder with other names are kept.

    Raises:
        NotADirectoryError: If ``target`` is a file.
        OSError: If a write fails, for example on a full disk; the old version is intact.
    """
    target = target.resolve()  # replaces the folder that a link leads to, not the link
    if target.exists() and not target.is_dir():
        msg = f"{target}: expected a folder or a path that does not exist, got a file"
        raise NotADirectoryError(msg)
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    _sweep(target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        write(temporary)
        if target.is_dir():
            for other in target.iterdir():
                if other.name not in owned:
                    _copy_unless_removed(other, temporary / other.name)
        temporary.chmod(0o755)
        sync_folder(temporary)
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(_backup(target), ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Restore a folder whose replacement was interrupted between its two renames."""
    if not target.exists() and _backup(target).is_dir():
        with contextlib.suppress(OSError):  # another process restored it first
            _backup(target).rename(target)


def read_stable(path: Path, read: Callable[[Path], T]) -> T:
    """Read a folder that other processes may be replacing; a read that a replacement made fail is repeated.

    Args:
        path: Folder to read.
        read: Function that reads the folder that it gets.

    Returns:
        Result of ``read``.
    """
    path = path.resolve()
    for _ in range(PATIENCE):
        before = identity(path)
        try:
            return read(path)
        except (OSError, PrefixFastError):
            time.sleep(0.01)
            if identity(path) == before and (before is not None or not _backup(path).is_dir()):
                raise
    recover_folder(path)  # all this time no writer finished the replacement, so its writer is dead
    return read(path)


def identity(folder: Path) -> tuple[int, int] | None:
    """Inode and change time of a folder, None if there is none.

    They change when the folder is replaced and when files are added to it or removed from it.
    """
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns  # a new folder can get the inode number of a removed one


def _copy_unless_removed(source: Path, target: Path) -> None:
    """Copy a file or folder; one that another process removes meanwhile is left out."""
    try:
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    except (OSError, shutil.Error):
        if os.path.lexists(source):
            raise
        shutil.rmtree(target, ignore_errors=True)


def _backup(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _swap(temporary: Path, target: Path) -> None:
    """Rename ``target`` to its backup and ``temporary`` to ``target``; repeated if another process comes between."""
    for attempt in range(PATIENCE):
        try:
            if target.exists():
                shutil.rmtree(_backup(target), ignore_errors=True)
                target.rename(_backup(target))
            temporary.rename(target)
        except OSError as e:
            if (
                e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
                or attempt + 1 == PATIENCE
                or not temporary.exists()
            ):
                raise
        else:
            return


def _sweep(target: Path) -> None:
    """Remove temporary folders of killed writers beside the target."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder to disk; does nothing on platforms that cannot (Windows).

    A folder that another process has removed has no entries left to sync. What was written to it took effect first, so
    that its writer must not fail.
    """
    with contextlib.suppress(PermissionError, FileNotFoundError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
