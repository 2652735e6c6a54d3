"""Between a store and a folder of adapter folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prefixfast.errors import ConfigError, DataError
from prefixfast.io.atomic import replace_file
from prefixfast.prefix.peft_format import read_json
from prefixfast.prefix.prefix import Prefix
from prefixfast.store.entry import ENTRY, name_hash
from prefixfast.store.reports import Outcome

ADAPTER = ("adapter_config.json", "prefixfast.json")  # a prefix folder has one of them
PLAIN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9_-])?")  # the same folder on every file system
RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{i}" for device in ("com", "lpt") for i in range(10))}


def read_adapters(root: Path) -> Iterator[tuple[str, Path, Prefix] | Outcome]:
    """The adapter folders in a folder, in the order of their names.

    Returns:
        Name, folder and prefix of each; an `Outcome` with the reason for one that cannot be imported.

    Raises:
        ConfigError: If ``root`` is no folder, or an adapter itself.
    """
    if not root.is_dir():
        msg = f"import: expected a folder of adapter folders, got {str(root)!r}"
        raise ConfigError(msg)
    if is_adapter(root):
        msg = f"import: {str(root)!r} is an adapter folder itself; put it under a name, or give the folder that it lies in"
        raise ConfigError(msg)
    seen: dict[str, str] = {}
    for folder in [p for p in sorted(root.iterdir()) if not p.name.startswith(".") and (p.is_symlink() or p.is_dir())]:
        name: str | None = None
        try:
            check_inside(root, folder)
            name = exported_name(folder) or folder.name
            prefix = Prefix.from_pretrained(folder)
            if name in seen:
                msg = f"{seen[name]} has the same name"
                raise DataError(msg)
        except (DataError, OSError) as e:
            yield Outcome(name, str(folder), False, str(e))
            continue
        seen[name] = folder.name
        yield name, folder, prefix


def check_target(root: Path, store: Path, names: Iterable[str] | None) -> None:
    """Raise `ConfigError` if prefixes of a store cannot be exported to a folder."""
    if isinstance(names, str):
        msg = f"names: expected several names, got the text {names!r}"
        raise ConfigError(msg)
    if root.exists() and not root.is_dir():
        msg = f"export: expected a folder or nothing, got {str(root)!r}"
        raise ConfigError(msg)
    if root.resolve().is_relative_to(store.resolve()):
        msg = f"export: {str(root)!r} lies in the store itself"
        raise ConfigError(msg)


def export(prefixes: Mapping[str, Prefix], name: str, root: Path) -> Outcome:
    """Write one prefix into its own folder in ``root``."""
    target = root / folder_name(name)
    try:
        prefix = prefixes[name]
        new = not os.path.lexists(target)
        if not new and (target.is_symlink() or not target.is_dir() or exported_name(target) != name):
            msg = f"{target} is in the way: it is no export of this name"
            raise DataError(msg)
    except (DataError, KeyError) as e:
        return Outcome(name, str(target), False, str(e))
    try:
        if new:
            target.mkdir()
            replace_file(target / ENTRY, json.dumps({"name": name}).encode())
        prefix.save_pretrained(target)
    except BaseException:
        if new:
            shutil.rmtree(target, ignore_errors=True)
        raise
    return Outcome(name, str(target), True, "", prefix.digest)


def is_adapter(folder: Path) -> bool:
    """Whether a folder looks like one prefix."""
    return any((folder / name).exists() for name in ADAPTER)


def exported_name(folder: Path) -> str | None:
    """The name under which a folder was exported; None if it was not.

    Raises:
        DataError: If what says so is damaged.
    """
    if not (folder / ENTRY).exists():
        return None
    name = read_json(folder / ENTRY).get("name")
    if not isinstance(name, str) or not name:
        msg = f"{ENTRY}: name: expected a text that is not empty, got {name!r:.200}"
        raise DataError(msg, path=str(folder / ENTRY))
    return name


def folder_name(name: str) -> str:
    """A folder name that every file system takes, different for different names."""
    if PLAIN.fullmatch(name) and name.partition(".")[0] not in RESERVED:
        return name
    like = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40].strip("_-") or "prefix"
    return f"{like}-{name_hash(name)[:16]}"


def check_inside(root: Path, folder: Path) -> None:
    """Raise `DataError` unless a folder and its files are plain ones within ``root``: a link may lead to what its sender may not read."""
    real_root = os.path.realpath(root)
    for path in (folder, *_listed(folder)):
        try:
            real = os.path.realpath(path, strict=True)
            mode = Path(real).stat().st_mode
        except OSError as e:
            msg = f"{path.name}: a link that leads nowhere: {e.strerror}"
            raise DataError(msg, path=str(path)) from e
        if os.path.commonpath((real, real_root)) != real_root:
            msg = f"{path.name}: a link that leads out of {root}; copy what it leads to"
            raise DataError(msg, path=str(path))
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            msg = f"{path.name}: neither a file nor a folder"
            raise DataError(msg, path=str(path))


def _listed(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []
