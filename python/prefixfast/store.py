"""`PrefixStore`: a directory of prefixes by name, each version a folder that is either wholly there or not at all.

Layout: ``{2 hex}/{SHA-256 of the name}/{version}/`` holds what `Prefix.save_pretrained` writes and ``entry.json`` with the real name and everything
about the prefix but its tensors, so that ten thousand prefixes can be known without reading one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, DataError, UnknownPrefixError
from prefixfast.files import sync_folder, write_file
from prefixfast.interchange.peft import read_json
from prefixfast.prefix import Prefix

ENTRY = "entry.json"
FIELDS = ("digest", "pos_start", "window", "base", "linearizer", "decoding")
Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class StoredPrefix:
    """A prefix that lies in a store: all but its tensors, which `read` gets.

    Attributes:
        name: Its name in the store.
        folder: The folder of this version; a `Prefix` folder.
        shapes: Of each tensor: P, H, D.
        digest: See `Prefix`; so are the following.
        pos_start: See ``digest``.
        window: See ``digest``.
        base: See ``digest``.
        linearizer: See ``digest``.
        decoding: See ``digest``.
    """

    name: str
    folder: Path
    shapes: Mapping[str, Shape]
    digest: str
    pos_start: int
    window: str
    base: Mapping[str, Any] | None
    linearizer: Mapping[str, Any] | None
    decoding: Mapping[str, Any]

    @property
    def length(self) -> int:
        """P, of the longest layer."""
        return max(p for p, _, _ in self.shapes.values())

    def read(self) -> Prefix:
        """The prefix itself.

        Raises:
            DataError: If the folder is gone or damaged, or holds another prefix than its entry says.
        """
        prefix = Prefix.from_pretrained(self.folder)
        if prefix.digest != self.digest:
            msg = f"{self.folder}: the tensors are not those of {ENTRY}; put the prefix again"
            raise DataError(msg, path=str(self.folder))
        return prefix


class PrefixStore(Mapping[str, Prefix]):
    """Prefixes by name in a directory that several processes may use; a name is any text.

    Args:
        path: The directory; made if it is not there, unless ``read_only``.
        read_only: Refuse to write.
        keep_versions: How many versions of a name are kept.

    Raises:
        ConfigError: For a path that is a file or, read-only, not there.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, keep_versions: int = 2) -> None:
        self.path, self.read_only, self.keep_versions = Path(path), read_only, keep_versions
        if keep_versions < 1:
            msg = f"keep_versions: expected at least 1, got {keep_versions}"
            raise ConfigError(msg)
        if not read_only and not self.path.exists():
            self.path.mkdir(parents=True)
        if not self.path.is_dir():
            msg = f"store: expected a directory, got {str(self.path)!r}"
            raise ConfigError(msg)

    def put(self, name: str, prefix: Prefix) -> StoredPrefix:
        """Save a new version of ``name``; older ones beyond ``keep_versions`` go.

        Raises:
            ConfigError: If the store is read-only or the name is empty.
            OSError: If the disk refuses; what was there before is intact.
        """
        if self.read_only:
            msg = f"store {str(self.path)!r} was opened read-only"
            raise ConfigError(msg)
        folder = self._folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        entry = {"name": name, "shapes": {n: list(shape) for n, shape in prefix.shapes.items()}} | {f: getattr(prefix, f) for f in FIELDS}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new.") as temporary:
            new = Path(temporary, "new")
            prefix.save_pretrained(new)
            write_file(new / ENTRY, json.dumps(entry, sort_keys=True).encode())
            sync_folder(new)
            target = _settle(new, folder)
        sync_folder(folder)
        for old in _versions(folder)[: -self.keep_versions]:
            shutil.rmtree(old, ignore_errors=True)
        return _entry(target)

    def info(self, name: str) -> StoredPrefix:
        """The newest version of ``name``, unread.

        Raises:
            UnknownPrefixError: If there is none.
            DataError: If its entry is damaged.
        """
        versions = _versions(self._folder(name))
        if not versions:
            msg = f"no prefix is named {name!r} in {self.path}"
            raise UnknownPrefixError(msg)
        return _entry(versions[-1])

    def get(self, name: str, default: Any = None) -> Any:
        """The newest version of ``name``, read; ``default`` if there is none."""
        try:
            return self[name]
        except UnknownPrefixError:
            return default

    def __getitem__(self, name: str) -> Prefix:
        return self.info(name).read()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(name) and bool(_versions(self._folder(name)))

    def __iter__(self) -> Iterator[str]:
        for folder in sorted(self.path.glob("??/*")):
            if versions := _versions(folder):
                yield _entry(versions[-1]).name

    def __len__(self) -> int:
        return sum(bool(_versions(folder)) for folder in self.path.glob("??/*"))

    def _folder(self, name: str) -> Path:
        if not isinstance(name, str) or not name:
            msg = f"name: expected a text that is not empty, got {name!r}"
            raise ConfigError(msg)
        digest = hashlib.sha256(name.encode("utf8", "surrogatepass")).hexdigest()
        return self.path / digest[:2] / digest


def _versions(folder: Path) -> list[Path]:
    """Complete versions, oldest first."""
    try:
        found = [p for p in folder.iterdir() if p.name.isdecimal()]
    except OSError:
        return []
    return sorted(found, key=lambda p: int(p.name))


def _settle(new: Path, folder: Path) -> Path:
    """Give a finished version the next free number; another process may be doing the same."""
    while True:
        versions = _versions(folder)
        target = folder / f"{int(versions[-1].name) + 1 if versions else 1:06d}"
        try:
            new.rename(target)
        except OSError:
            if not target.exists():
                raise
        else:
            return target


def _entry(folder: Path) -> StoredPrefix:
    found = read_json(folder / ENTRY)
    try:
        shapes = {str(n): (int(p), int(h), int(d)) for n, (p, h, d) in found["shapes"].items()}
        return StoredPrefix(found["name"], folder, shapes, **{f: found[f] for f in FIELDS})
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        msg = f"{ENTRY}: expected name, shapes and {', '.join(FIELDS)}, got {e!r}; put the prefix again"
        raise DataError(msg, path=str(folder / ENTRY)) from e
