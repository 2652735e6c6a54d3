"""The version folders of one name: listed, read and added to while other processes do the same."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefixfast.errors import DataError
from prefixfast.io.atomic import PATIENCE, identity, sync_folder

T = TypeVar("T")
NUMBER = re.compile(r"[0-9]{1,18}")
ATTEMPTS = 1000
FASTER = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # what another writer of the same name makes of a rename


def version_folders(folder: Path) -> list[Path]:
    """Complete versions of a name, oldest first; none if there is no such name."""
    try:
        found = [p for p in folder.iterdir() if NUMBER.fullmatch(p.name)]
    except OSError:
        return []
    return sorted(found, key=lambda p: int(p.name))


def read_newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    """``read`` of the newest version, again when it was replaced meanwhile; None if there is no version.

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


def settle(new: Path, folder: Path) -> Path:
    """Give a finished version the next free number; other processes may be putting or deleting the same name.

    Args:
        new: The version, alone in a folder that becomes that of the name if there is none yet: so a name's folder is never empty.
        folder: Where the versions of the name lie.
    """
    folder.parent.mkdir(exist_ok=True)
    for attempt in range(ATTEMPTS):
        versions = version_folders(folder)
        number = f"{int(versions[-1].name) + 1 if versions else 1:06d}"
        try:
            if folder.exists():
                new.rename(folder / number)
            else:
                _begin(new, folder, number)
        except OSError as e:
            if e.errno not in FASTER or not new.exists() or attempt + 1 == ATTEMPTS:
                raise
        else:
            break
    for changed in (folder, folder.parent, folder.parent.parent):
        sync_folder(changed)
    return folder / number


def _begin(new: Path, folder: Path, number: str) -> None:
    first = new.parent / number
    new.rename(first)
    sync_folder(new.parent)
    try:
        new.parent.rename(folder)
    except OSError:
        first.rename(new)
        raise
