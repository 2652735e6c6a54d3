"""Version folders of one name, which several processes can list, read and add at once."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefixfast.errors import DataError
from prefixfast.io.atomic import identity, sync_folder

T = TypeVar("T")
NUMBER = re.compile(r"[0-9]{1,18}")
ATTEMPTS = 1000  # attempts of a rename or a read that other writers of the same name can disturb
DISTURBED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # errors of a rename that another writer disturbed


def version_folders(folder: Path) -> list[Path]:
    """Folders of the complete versions of a name, oldest first; empty if there is no such name."""
    try:
        found = [p for p in folder.iterdir() if NUMBER.fullmatch(p.name)]
    except OSError:
        return []
    return sorted(found, key=lambda p: int(p.name))


def read_newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    """Read the newest version of a name; a version that was replaced meanwhile is read again.

    Args:
        folder: Folder of the name.
        read: Function that reads the folder of a version.

    Returns:
        Result of ``read``, None if there is no version.

    Raises:
        DataError: If the version is damaged.
    """
    for attempt in range(ATTEMPTS):
        versions = version_folders(folder)
        if not versions:
            return None
        before = identity(versions[-1])
        try:
            return read(versions[-1])
        except (DataError, OSError):
            if attempt + 1 == ATTEMPTS or identity(versions[-1]) == before is not None:
                raise
    raise AssertionError


def read_all(folder: Path, read: Callable[[Path], T]) -> list[T]:
    """Read all versions of a name, oldest first; a version that is removed meanwhile is left out.

    Args:
        folder: Folder of the name.
        read: Function that reads the folder of a version.

    Returns:
        Results of ``read``, empty if there is no version.

    Raises:
        DataError: If a version is damaged.
    """
    for _ in range(ATTEMPTS):
        found: list[T] = []
        versions = version_folders(folder)
        for version in versions:
            before = identity(version)
            try:
                found.append(read(version))
            except (DataError, OSError):
                if identity(version) == before is not None:  # else another process has removed or replaced it
                    raise
        if found or not versions:
            return found
    return []


def publish_version(new: Path, folder: Path) -> Path:
    """Move a finished version to the next free number; other processes can put or delete the same name meanwhile.

    Args:
        new: Folder of the version, alone in its parent folder. The parent becomes the folder of a new name, so that
            the folder of a name is never empty.
        folder: Folder of the name.

    Returns:
        New folder of the version.
    """
    folder.parent.mkdir(exist_ok=True)
    for attempt in range(ATTEMPTS):
        versions = version_folders(folder)
        number = f"{int(versions[-1].name) + 1 if versions else 1:06d}"
        try:
            if folder.exists():
                new.rename(folder / number)
            else:
                _publish_first(new, folder, number)
        except OSError as e:
            if e.errno not in DISTURBED or not new.exists() or attempt + 1 == ATTEMPTS:
                raise
        else:
            break
    for changed in (folder, folder.parent, folder.parent.parent):
        sync_folder(changed)
    return folder / number


def remove_old_versions(folder: Path, keep: int, work: Path) -> None:
    """Move all versions of a name but the newest ones to another folder.

    The folder of the name is held open. If the name is deleted and put again meanwhile, the numbers start again, and a
    path could lead to a new version of the same number.

    Args:
        folder: Folder of the name.
        keep: Number of versions to keep.
        work: Folder that gets the old versions.
    """
    try:
        held = os.open(folder, os.O_RDONLY) if os.rename in os.supports_dir_fd else None
    except FileNotFoundError:  # the name was deleted
        return
    try:
        with os.scandir(folder if held is None else held) as entries:
            names = [entry.name for entry in entries]
        for name in sorted(filter(NUMBER.fullmatch, names), key=int)[:-keep]:
            with contextlib.suppress(OSError):  # another writer has removed the version, or the next one will
                if held is None:
                    (folder / name).rename(work / f"old-{name}")
                else:
                    os.rename(name, work / f"old-{name}", src_dir_fd=held)
    finally:
        if held is not None:
            os.close(held)


def _publish_first(new: Path, folder: Path, number: str) -> None:
    """Move the first version of a name together with its parent, which becomes the folder of the name."""
    first = new.parent / number
    new.rename(first)
    sync_folder(new.parent)
    try:
        new.parent.rename(folder)
    except OSError:
        first.rename(new)
        raise
