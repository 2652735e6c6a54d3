"""Files that are either wholly there or not at all: written beside the target, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

BACKUP = ".{name}.previous"


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
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    backup = target.parent / BACKUP.format(name=target.name)
    try:
        write(temporary)
        if target.is_dir():
            for other in target.iterdir():
                if other.name not in owned:
                    (shutil.copytree if other.is_dir() else shutil.copy2)(other, temporary / other.name)
        temporary.chmod(0o755)
        sync_folder(temporary)
        if target.exists():
            target.rename(backup)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(backup, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put a folder back whose replacement was cut between the two renames; drop a backup whose replacement is complete."""
    backup = target.parent / BACKUP.format(name=target.name)
    if backup.is_dir():
        if target.exists():
            shutil.rmtree(backup, ignore_errors=True)
        else:
            backup.rename(target)


def sync_folder(path: Path) -> None:
    """Sync a folder's entries; where the platform cannot (Windows), do nothing."""
    with contextlib.suppress(PermissionError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
