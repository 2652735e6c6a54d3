"""Files that are either wholly there or not at all: written beside the target, synced, then renamed."""

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
PATIENCE = 20
STALE_SECONDS = 600


def write_file(path: Path, data: bytes) -> None:
    """Write and sync one new file (not atomic by itself; see `replace_file` and `replace_folder`)."""
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Atomically make ``path`` hold ``data``; its folder is created."""
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
    """Make ``target`` a folder with what ``write`` puts into an empty one; at every moment the old or the new version is complete on disk.

    Args:
        target: The folder; its parents are created.
        write: Writes files into the folder that it is given.
        owned: Names that the new version replaces; other files of an existing folder are carried over.

    Raises:
        OSError: When the disk is full, for example; the old version is untouched.
    """
    target = target.resolve()  # through a link: the folder behind it is replaced
    if target.exists() and not target.is_dir():
        msg = f"{target} is a file; expected a folder or nothing"
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
                    (shutil.copytree if other.is_dir() else shutil.copy2)(other, temporary / other.name)
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
    """Put a folder back whose replacement was cut between the two renames."""
    if not target.exists() and _backup(target).is_dir():
        with contextlib.suppress(OSError):  # somebody else was faster
            _backup(target).rename(target)


def read_settled(path: Path, read: Callable[[Path], T]) -> T:
    """Read a folder that another process may be replacing: a failure is final only if the folder is the same before and after it."""
    path = path.resolve()
    for _ in range(PATIENCE):
        before = identity(path)
        try:
            return read(path)
        except (OSError, PrefixFastError):
            time.sleep(0.01)
            if identity(path) == before and (before is not None or not _backup(path).is_dir()):
                raise
    recover_folder(path)  # no writer finishes this replacement: it was cut
    return read(path)


def identity(folder: Path) -> tuple[int, int] | None:
    """Which folder lies at a path: it changes when the folder is replaced or its files come and go; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns  # a new folder may get the number of one that is gone


def _backup(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _swap(temporary: Path, target: Path) -> None:
    """The two renames; again when a reader's recovery or another writer came between."""
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
    """Remove what killed writers left beside the target."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Sync a folder's entries; where the platform cannot (Windows), do nothing."""
    with contextlib.suppress(PermissionError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
