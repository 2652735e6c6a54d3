"""One version of a stored prefix: its folder, and ``entry.json``, which holds the real name and everything about the prefix but its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, DataError
from prefixfast.prefix.folder import OLD_KEYS, layers_of
from prefixfast.prefix.peft_format import read_json
from prefixfast.prefix.prefix import Prefix
from prefixfast.store.versions import version_folders

Shape = tuple[int, int, int]
ENTRY = "entry.json"
FIELDS = ("digest", "pos_start", "window", "base", "task", "decoding")


@dataclass(frozen=True, eq=False)
class StoredPrefix:
    """A prefix that lies in a store: all but its tensors, which `read` gets.

    Attributes:
        name: Its name in the store.
        folder: The folder of this version; a `Prefix` folder.
        shapes: Of each tensor: P, H, D.
        digest: See `Prefix`; so are the following, up to ``decoding``.
        pos_start: See ``digest``.
        window: See ``digest``.
        base: See ``digest``.
        task: See ``digest``.
        decoding: See ``digest``.
        nbytes: Bytes of the tensors.
        created: When it was put, UTC, ISO 8601.
    """

    name: str
    folder: Path
    shapes: Mapping[str, Shape]
    digest: str
    pos_start: int
    window: str
    base: Mapping[str, Any] | None
    task: Mapping[str, Any] | None
    decoding: Mapping[str, Any]
    nbytes: int
    created: str

    @property
    def version(self) -> int:
        """Its number; the greatest is the newest."""
        return int(self.folder.name)

    @property
    def length(self) -> int:
        """P, of the longest layer."""
        return max(p for p, _, _ in self.shapes.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """See `Prefix.layers`."""
        return layers_of(self.shapes)

    def read(self) -> Prefix:
        """The prefix itself; from another version with the same digest if this one has been replaced.

        Raises:
            DataError: If the folder is gone or damaged, or holds another prefix than its entry says.
        """
        try:
            return self.read_here()
        except DataError:
            for folder in version_folders(self.folder.parent):
                try:
                    other = read_entry(folder)
                    if other.digest == self.digest:
                        return other.read_here()
                except DataError:
                    continue
            raise

    def read_here(self) -> Prefix:
        """The prefix itself, from this very version.

        Raises:
            DataError: See `read`.
        """
        prefix = Prefix.from_pretrained(self.folder)
        if wrong := self.differences(prefix):
            msg = f"{self.folder}: the prefix and {ENTRY} differ in {', '.join(wrong)}; put the prefix again"
            raise DataError(msg, path=str(self.folder))
        return prefix

    def differences(self, prefix: Prefix) -> list[str]:
        """Compare what the entry says with a prefix.

        Args:
            prefix: What may be the same.

        Returns:
            Names of the fields in which it is another.
        """
        theirs = json.loads(json.dumps(_fields(prefix)))
        ours = json.loads(json.dumps({field: _plain(getattr(self, field)) for field in theirs}))
        return [field for field in theirs if ours[field] != theirs[field]]


def name_hash(name: str) -> str:
    """Hex SHA-256 of a name: the name of its folder.

    Raises:
        ConfigError: If it is no text, or empty.
    """
    if not isinstance(name, str) or not name:
        msg = f"name: expected a text that is not empty, got {name!r}"
        raise ConfigError(msg)
    return hashlib.sha256(name.encode("utf8", "surrogatepass")).hexdigest()


def entry_bytes(name: str, prefix: Prefix) -> bytes:
    """The content of ``entry.json``."""
    told = {"name": name, "nbytes": prefix.nbytes, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    fields = {OLD_KEYS.get(name, name): value for name, value in _fields(prefix).items()}
    return json.dumps(told | fields, sort_keys=True).encode()


def read_entry(folder: Path) -> StoredPrefix:
    """The entry of one version.

    Raises:
        DataError: If it is missing, damaged, or that of another name.
    """
    return parse_entry(_read(folder), folder)


def read_name(folder: Path) -> str:
    """Only the name of one version; see `read_entry`."""
    name = _read(folder).get("name")
    if not _is_name_of(name, folder):
        msg = f"{ENTRY}: name: got {name!r:.200}; put the prefix again"
        raise DataError(msg, path=str(folder / ENTRY))
    return str(name)


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / ENTRY)
    except OSError as e:
        msg = f"{ENTRY}: cannot be read: {e}"
        raise DataError(msg, path=str(folder / ENTRY)) from e


def _is_name_of(name: Any, folder: Path) -> bool:
    """Whether a version folder lies where those of a name do."""
    return isinstance(name, str) and bool(name) and name_hash(name) == folder.parent.name


def parse_entry(found: dict[str, Any], folder: Path) -> StoredPrefix:
    """What ``entry.json`` in ``folder`` says, checked; see `read_entry`."""
    try:
        shapes = {str(n): (p, h, d) for n, (p, h, d) in found["shapes"].items()}
        stored = StoredPrefix(
            folder=folder,
            shapes=shapes,
            **{f: found[OLD_KEYS.get(f, f)] for f in ("name", "nbytes", "created", *FIELDS)},
        )
        wrong = next((field for field, right in _checks(stored).items() if not right), None)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        msg = (
            f"{ENTRY}: expected name, shapes, nbytes, created and {', '.join(FIELDS)}, got {e!r}; put the prefix again"
        )
        raise DataError(msg, path=str(folder / ENTRY)) from e
    if wrong is not None:
        msg = f"{ENTRY}: {wrong}: got {getattr(stored, wrong)!r:.200}; put the prefix again"
        raise DataError(msg, path=str(folder / ENTRY))
    return stored


def _checks(stored: StoredPrefix) -> dict[str, bool]:
    """By field whether it can be right: an engine lays out its memory by them before it reads the tensors."""
    sizes = [size for shape in stored.shapes.values() for size in shape]
    return {
        "name": _is_name_of(stored.name, stored.folder),
        "shapes": bool(sizes) and all(type(size) is int and size > 0 for size in sizes),
        "digest": isinstance(stored.digest, str) and re.fullmatch("[0-9a-f]{64}", stored.digest) is not None,
        "pos_start": type(stored.pos_start) is int and stored.pos_start >= 0,
        "window": stored.window in ("slide", "always"),
        "base": stored.base is None or isinstance(stored.base, dict),
        "task": stored.task is None or isinstance(stored.task, dict),
        "decoding": isinstance(stored.decoding, dict),
        "nbytes": type(stored.nbytes) is int and stored.nbytes > 0,
        "created": isinstance(stored.created, str),
    }


def _fields(prefix: Prefix) -> dict[str, Any]:
    return {"shapes": {n: list(shape) for n, shape in prefix.shapes.items()}} | {f: getattr(prefix, f) for f in FIELDS}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
