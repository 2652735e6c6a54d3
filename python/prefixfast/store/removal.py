"""Removal of all versions of a name. This module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from prefixfast.io.atomic import sync_folder
from prefixfast.store.verify import removed_digest
from prefixfast.store.versions import version_folders
from prefixfast.store.workspace import atomic_removal


class RemovedVersions(NamedTuple):
    """What a removal has removed.

    Attributes:
        files: Number of files.
        bytes: Bytes of the files.
        digests: Digest of each version, None for a version whose entry is damaged.
    """

    files: int = 0
    bytes: int = 0
    digests: tuple[str | None, ...] = ()


def remove_versions(folder: Path, work: Path) -> RemovedVersions | None:
    """Remove the folder of a name at once.

    Args:
        folder: Folder of the name.
        work: Folder of the store's unfinished work.

    Returns:
        Removed files and digests, None if there is no such folder.

    Raises:
        OSError: If a file cannot be removed. The name is removed in any case.
    """
    try:
        with atomic_removal(folder, work) as gone:
            sync_folder(folder.parent)
            sizes = [p.lstat().st_size for p in gone.rglob("*") if not p.is_dir()]
            digests = tuple(removed_digest(version) for version in version_folders(gone))
    except FileNotFoundError:
        return None
    return RemovedVersions(len(sizes), sum(sizes), digests)
