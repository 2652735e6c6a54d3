"""Version folders of one name, which several processes can list, read and add at once."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefixfast.errors import DataError
from prefixfast.io.atomic import PATIENCE, identity, sync_folder

T = TypeVar("T")
NUMBER = re.compile(r"[0-9]{1,18}")
ATTEMPTS = 1000  # attempts of a rename that other writers of the same name can disturb
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
    for attempt in range(PATIENCE):
        versions = version_folders(folder)
        if not versions:
            return None
        before = identity(versions[-1])
        try:
            return read(versions[-1])
        except (DataError, OSError):
            if attempt + 1 == PATIENCE or identity(versions[-1]) == before is not None:
                raise
    raise AssertionError


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
        with contextlib.suppress(FileNotFoundError):  # another process has deleted the name meanwhile
            sync_folder(changed)
    return folder / number


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
