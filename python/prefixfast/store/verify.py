"""Verification of a whole store: every version matches its entry, and nothing is left of a deleted prefix."""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.io.atomic import identity
from prefixfast.io.progress import Progress, track
from prefixfast.store.entry import ENTRY, read_entry
from prefixfast.store.reports import Check, Outcome
from prefixfast.store.runs import STATE, TENSORS
from prefixfast.store.versions import version_folders

# Files of a training checkpoint. Its tensors are no prefix; the other file has the digest of each finished prefix.
CHECKPOINT_FILES = {STATE, TENSORS}


def checked_places(also: Iterable[str | os.PathLike[str]], absent: str | None) -> list[Path]:
    """Absolute paths of further folders to search for a digest.

    Raises:
        ConfigError: If there is no digest, or a path leads to no folder.
    """
    if isinstance(also, str | os.PathLike):
        msg = f"also: expected a sequence of folders, got {shown(str(also))}; put it in a list"
        raise ConfigError(msg)
    places = [Path(place).absolute() for place in also]
    if places and absent is None:
        msg = "also: expected absent beside it, the digest to search for"
        raise ConfigError(msg)
    for place in places:
        if not place.is_dir():
            msg = f"also: expected a folder, got {shown(str(place))}"
            raise ConfigError(msg)
    return places


def verify(root: Path, names: Iterable[Path], absent: str | None, also: Iterable[Path] = ()) -> Check:
    """Read every version of a store and compare it with its entry.

    Args:
        root: Directory of the store.
        names: Folders of the names in the store.
        absent: Digest of a deleted prefix. Every file is searched for the digest, and every folder with tensors for
            the prefix. None skips the search.
        also: Further folders to search.

    Raises:
        ConfigError: If ``absent`` is not a digest.
    """
    if absent is not None and not (isinstance(absent, str) and re.fullmatch("[0-9a-f]{64}", absent)):
        msg = f"absent: expected the digest of a prefix (64 hexadecimal digits), got {shown(absent)}"
        raise ConfigError(msg)
    folders = [version for folder in names for version in version_folders(folder)]
    with track(folders, "verify", len(folders), "versions") as each:
        damaged = [found for folder in each if (found := _damage(root, folder)) is not None]
    if absent is None:
        return Check(len(folders), tuple(damaged))
    holding: list[str] = []
    places = [root, *(place for place in dict.fromkeys(also) if place != root)]
    with Progress("search for the deleted prefix"):
        for place in places:
            for path, why in _search(place, absent):
                name = path.relative_to(root).as_posix() if place == root else str(path)
                if why is None:
                    holding.append(name)
                elif name not in {d.path for d in damaged}:
                    damaged.append(Outcome(None, name, False, why))
    return Check(len(folders), tuple(damaged), tuple(sorted(set(holding))), tuple(map(str, places)))


def _damage(root: Path, version: Path) -> Outcome | None:
    """Result for a version that is damaged, None if the version is fine or was replaced meanwhile."""
    name, before = None, identity(version)
    try:
        stored = read_entry(version)
        name = stored.name
        stored.read_here()
    except (DataError, OSError) as e:
        if identity(version) != before or not os.path.lexists(version):  # replaced meanwhile
            return None
        return Outcome(name, version.relative_to(root).as_posix(), False, str(e))
    return None


def _search(root: Path, digest: str) -> Iterator[tuple[Path, str | None]]:
    """Files and folders that hold a digest, each with None, and paths that cannot be searched, with the reason."""
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.prefix.tuned_folder import is_tuned
    from prefixfast.prefix.tuned_weights import TunedWeights

    for folder, _, names in os.walk(root):
        for path in (Path(folder, n) for n in names):
            try:
                if not stat.S_ISREG(path.lstat().st_mode):
                    yield path, "neither a file nor a folder, so it cannot be searched"
                elif _contains(path, digest.encode()):
                    yield path, None
            except FileNotFoundError:  # removed by another process
                continue
        tensor_files = {n for n in names if n.endswith(".safetensors")}
        if tensor_files - (CHECKPOINT_FILES if set(names) >= CHECKPOINT_FILES else set()):
            before = identity(Path(folder))
            try:
                kind = TunedWeights if is_tuned(Path(folder)) else Prefix
                if kind.from_pretrained(Path(folder)).digest == digest:
                    yield Path(folder), None
            except DataError as e:
                if identity(Path(folder)) == before is not None:  # else another process has removed or replaced it
                    yield Path(folder), f"its tensors cannot be searched: {e}"


def _contains(path: Path, text: bytes) -> bool:
    with path.open("rb") as f:
        if os.fstat(f.fileno()).st_size == 0:
            return False
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text) >= 0


def removed_digest(version: Path) -> str | None:
    """Digest in the entry of a version that was moved out of the folder of its name, None if it cannot be read."""
    try:
        found = json.loads((version / ENTRY).read_bytes())["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
