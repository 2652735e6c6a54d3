"""`StoredPrefix`, one version of a prefix in a store, and its file ``entry.json``.

``entry.json`` holds the name and everything about the prefix but its tensors. This module imports no torch until
tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.config.options import INT32_MAX, INT64_MAX
from prefixfast.errors import ConfigError, DataError, shown, warn_renamed
from prefixfast.io.untrusted import read_json
from prefixfast.prefix.names import UNWRITTEN, base_error, file_key, written
from prefixfast.prefix.site_rows import SiteRows
from prefixfast.store.versions import version_folders

if TYPE_CHECKING:
    from prefixfast.model.fingerprint import Fingerprint
    from prefixfast.prefix.prefix import Prefix

Shape = tuple[int, int, int]
ENTRY = "entry.json"
FIELDS = ("digest", "pos_start", "window", "base", "task", "decoding", "position")


@dataclass(frozen=True, eq=False)
class StoredPrefix(SiteRows):
    """One version of a prefix in a store, without its tensors; `read` reads them.

    Attributes:
        name: Name of the prefix in the store.
        folder: Folder of the version, which `Prefix.from_pretrained` reads too.
        shapes: Shape ``(P, H, D)`` of each tensor.
        digest: Hex SHA-256 of tensors and conventions.
        pos_start: Position of the first token after the prefix.
        window: Rule of sliding windows, ``"slide"`` if they hide old prefix rows and ``"always"`` if they never do.
        base: Fingerprint of the base model, None if unknown.
        task: Name and settings of the task that makes prompts of rows, None for plain prompts.
        decoding: Default `GenerationParams` of the prefix.
        nbytes: Size of the tensors in bytes.
        created: Time of the put, UTC, ISO 8601.
        position: Place of the prefix in a sequence, ``"prefix"`` or ``"infix"``.
    """

    name: str
    folder: Path
    shapes: Mapping[str, Shape]
    digest: str
    pos_start: int
    window: str
    base: Fingerprint | None
    task: Mapping[str, JSON] | None
    decoding: Mapping[str, JSON]
    nbytes: int
    created: str
    position: str = "prefix"

    @property
    def linearizer(self) -> Mapping[str, JSON] | None:
        """Value of ``task``; a name of version 0.1.0."""
        warn_renamed("StoredPrefix.linearizer", "StoredPrefix.task")
        return self.task

    @property
    def version(self) -> int:
        """Number of the version; the largest number is the newest version."""
        return int(self.folder.name)

    def read(self) -> Prefix:
        """Read the prefix, from another version with the same digest if this version was replaced.

        Raises:
            DataError: If the folder is missing or damaged, or holds another prefix than its entry says.
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
        """Read the prefix from the folder of this version only.

        Raises:
            DataError: If the folder is missing or damaged, or holds another prefix than its entry says.
        """
        from prefixfast.prefix.prefix import Prefix

        prefix = Prefix.from_pretrained(self.folder)
        if wrong := self.differences(prefix):
            keys = ", ".join(map(file_key, wrong))
            msg = f"{self.folder}: the prefix and {ENTRY} differ in {keys}; put the prefix again"
            raise DataError(msg, path=str(self.folder))
        return prefix

    def differences(self, prefix: Prefix) -> list[str]:
        """Compare the entry with a prefix.

        Args:
            prefix: Prefix to compare.

        Returns:
            Names of the fields that differ; empty if the entry describes the prefix.
        """
        theirs = json.loads(json.dumps(_fields(prefix)))
        ours = json.loads(json.dumps({field: _as_dict(getattr(self, field)) for field in theirs}))
        return [field for field in theirs if ours[field] != theirs[field]]


def name_hash(name: str) -> str:
    """Hex SHA-256 of a name, which is the name of its folder.

    Raises:
        ConfigError: If the name is empty or not a string.
    """
    if not isinstance(name, str) or not name:
        msg = f"name: expected a string that is not empty, got {shown(name)}"
        raise ConfigError(msg)
    return hashlib.sha256(name.encode("utf8", "surrogatepass")).hexdigest()


def entry_bytes(name: str, prefix: Prefix) -> bytes:
    """Content of ``entry.json`` for a prefix that is put now."""
    about = {"name": name, "nbytes": prefix.nbytes, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    fields = {file_key(name): value for name, value in written(_fields(prefix)).items()}
    return json.dumps(about | fields, sort_keys=True).encode()


def read_entry(folder: Path) -> StoredPrefix:
    """Read the entry of one version.

    Raises:
        DataError: If the entry is missing or damaged, or has the name of another folder.
    """
    return parse_entry(_read(folder), folder)


def read_name(folder: Path) -> str:
    """Read the name in the entry of one version.

    Raises:
        DataError: If the entry is missing or damaged, or has the name of another folder.
    """
    name = _read(folder).get("name")
    if not _is_name_of(name, folder):
        msg = f"{ENTRY}: name: expected a string whose hash is that of the folder, got {shown(name)}; put it again"
        raise DataError(msg, path=str(folder / ENTRY))
    return str(name)


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / ENTRY)
    except OSError as e:
        msg = f"{ENTRY}: cannot be read: {e}"
        raise DataError(msg, path=str(folder / ENTRY)) from e


def _is_name_of(name: Any, folder: Path) -> bool:
    """Whether the folder of a version belongs to a name."""
    return isinstance(name, str) and bool(name) and name_hash(name) == folder.parent.name


def parse_entry(found: dict[str, Any], folder: Path) -> StoredPrefix:
    """Check the content of ``entry.json``.

    Args:
        found: Content of ``entry.json``.
        folder: Folder of the version.

    Raises:
        DataError: If a field is missing or wrong.
    """
    error, found = None, UNWRITTEN | found
    for field, (expected, fits) in CHECKS.items():
        key = file_key(field)
        if key not in found or not fits(found[key]):
            got = shown(found[key]) if key in found else "nothing"
            error = f"{key}: expected {expected}, got {got}"
            break
    if error is None and not _is_name_of(found["name"], folder):
        error = f"name: expected a string whose hash is that of the folder, got {shown(found['name'])}"
    if error := error or base_error(found["base"]):
        msg = f"{ENTRY}: {error}; put the prefix again"
        raise DataError(msg, path=str(folder / ENTRY))
    values = {field: found[file_key(field)] for field in CHECKS}
    values["shapes"] = {name: (p, h, d) for name, (p, h, d) in found["shapes"].items()}
    return StoredPrefix(folder=folder, **values)


def _are_shapes(value: Any) -> bool:
    """Whether a value holds the shape of each tensor of a prefix, with as many keys as values in each layer."""
    if not isinstance(value, dict) or not value or not all(map(TENSOR.fullmatch, value)):
        return False
    partners = [name[:-1] + ("v" if name[-1] == "k" else "k") for name in value]
    if not all(
        isinstance(s, list) and len(s) == 3 and all(_is_int(x, 1, INT32_MAX) for x in s) for s in value.values()
    ):
        return False
    return all(p in value and value[p][0] == shape[0] for p, shape in zip(partners, value.values(), strict=True))


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


TENSOR = re.compile(r"(self|enc|cross)\.(0|[1-9][0-9]{0,5})\.[kv]")
# Expected value and check of each field; an engine plans its memory by the entry, before it reads the tensors.
CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a string that is not empty", lambda x: isinstance(x, str) and bool(x)),
    "shapes": ("the shape [P, H, D] of the keys and values of each layer", _are_shapes),
    "digest": ("64 hexadecimal digits", _is_digest),
    "pos_start": (f"a position from 0 to {INT32_MAX}", lambda x: _is_int(x, 0, INT32_MAX)),
    "window": ("'slide' or 'always'", lambda x: isinstance(x, str) and x in ("slide", "always")),
    "base": ("an object or null", lambda x: isinstance(x, dict | None)),
    "task": ("an object or null", lambda x: isinstance(x, dict | None)),
    "decoding": ("an object", lambda x: isinstance(x, dict)),
    "nbytes": ("a number of bytes", lambda x: _is_int(x, 1, INT64_MAX)),
    "created": ("a time", lambda x: isinstance(x, str)),
    "position": ("'prefix' or 'infix'", lambda x: isinstance(x, str) and x in ("prefix", "infix")),
}


def _fields(prefix: Prefix) -> dict[str, Any]:
    return {"shapes": {n: list(shape) for n, shape in prefix.shapes.items()}} | {f: getattr(prefix, f) for f in FIELDS}


def _as_dict(value: Any) -> Any:
    """Mappings of other types than dict as a dict, which JSON can hold; other values unchanged."""
    return dict(value) if isinstance(value, Mapping) else value
