"""Import of a folder of adapter folders into a store, and export from a store to such a folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefixfast.errors import BaseMismatchError, ConfigError, DataError, shown
from prefixfast.io.progress import track
from prefixfast.io.untrusted import read_json
from prefixfast.store.entry import ENTRY, StoredPrefix, name_hash
from prefixfast.store.reports import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixfast.model.base import Model
    from prefixfast.prefix.prefix import Prefix

ADAPTER_FILES = ("adapter_config.json", "prefixfast.json")  # a prefix folder has at least one of them
PORTABLE = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9_-])?")  # names that all file systems take and tell apart
RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{i}" for device in ("com", "lpt") for i in range(10))}


def read_adapters(
    root: Path, model: str | Path | PreTrainedModel | Model | None
) -> Iterator[tuple[str, Path, Prefix] | Outcome]:
    """Read the adapter folders in a folder, in the order of their names.

    Args:
        root: Folder of adapter folders.
        model: Base model of adapters with virtual tokens, None without one.

    Yields:
        Name, folder and prefix of each adapter, or an `Outcome` with the reason why an adapter cannot be imported.

    Raises:
        ConfigError: If ``root`` is not a folder, or is an adapter folder itself.
    """
    from prefixfast.prefix.prefix import Prefix

    if not root.is_dir():
        msg = f"import: expected a folder of adapter folders, got {shown(str(root))}"
        raise ConfigError(msg)
    if is_adapter(root):
        msg = f"import: {shown(str(root))} is an adapter folder itself; add it under a name, or give its parent"
        raise ConfigError(msg)
    seen: dict[str, str] = {}
    folders = [p for p in sorted(root.iterdir()) if not p.name.startswith(".") and (p.is_symlink() or p.is_dir())]
    with track(folders, "import", len(folders), "folders") as each:
        for folder in each:
            name: str | None = None
            try:
                check_links_stay_inside(root, folder)
                name = exported_name(folder) or folder.name
                prefix = Prefix.from_pretrained(folder, model=model)
                if name in seen:
                    msg = f"{seen[name]} has the same name; rename one of them"
                    raise DataError(msg)
            except (DataError, BaseMismatchError, ConfigError, OSError) as e:
                yield Outcome(name, str(folder), False, str(e))
                continue
            seen[name] = folder.name
            yield name, folder, prefix


def check_export_arguments(root: Path, store: Path, names: Iterable[str] | None) -> None:
    """Raise `ConfigError` if the target folder or the names of an export are wrong."""
    if names is not None and (isinstance(names, str) or not isinstance(names, Iterable)):
        msg = f"names: expected a sequence of names, got {shown(names)}; put one name in a list"
        raise ConfigError(msg)
    if root.exists() and not root.is_dir():
        msg = f"export: expected a folder or a path that does not exist, got {shown(str(root))}"
        raise ConfigError(msg)
    if root.resolve().is_relative_to(store.resolve()):
        msg = f"export: {shown(str(root))} lies in the store itself; export to a folder outside of it"
        raise ConfigError(msg)


def export_all(prefixes: Mapping[str, Prefix], chosen: Sequence[StoredPrefix | Outcome], root: Path) -> list[Outcome]:
    """Write prefixes to folders in ``root``, and return the result of each.

    Args:
        prefixes: Prefixes by name.
        chosen: Entries of the prefixes, or the result of a name that cannot be read.
        root: Folder of the export.
    """
    with track(chosen, "export", len(chosen), "prefixes") as each:
        return [one if isinstance(one, Outcome) else export(prefixes, one.name, root) for one in each]


def export(prefixes: Mapping[str, Prefix], name: str, root: Path) -> Outcome:
    """Write one prefix to its own folder in ``root``.

    Args:
        prefixes: Prefixes by name.
        name: Name of the prefix.
        root: Folder of the export.
    """
    from prefixfast.prefix.folder import prefix_files, write_folder
    from prefixfast.prefix.tensors import shared_tensors

    target = root / folder_name(name)
    try:
        prefix = prefixes[name]
        if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or exported_name(target) != name):
            msg = f"{target} is in the way: it is not an export of this name; remove it or export to another folder"
            raise DataError(msg)
        files = prefix_files(shared_tensors(prefix.kv), prefix.digest, prefix.fields)
        write_folder(target, files | {ENTRY: json.dumps({"name": name}).encode()}, "prefix")
    except (DataError, KeyError, ConfigError) as e:
        return Outcome(name, str(target), False, str(e))
    return Outcome(name, str(target), True, "", prefix.digest)


def is_adapter(folder: Path) -> bool:
    """Whether a folder has the files of an adapter, or of a checkpoint of Li & Liang's code."""
    from prefixfast.prefix.authors_format import is_authors

    return any((folder / name).exists() for name in ADAPTER_FILES) or is_authors(folder)


def exported_name(folder: Path) -> str | None:
    """Name under which a folder was exported, None for folders that are not an export.

    Raises:
        DataError: If the file with the name is damaged.
    """
    if not (folder / ENTRY).exists():
        return None
    name = read_json(folder / ENTRY).get("name")
    if not isinstance(name, str) or not name:
        msg = f"{ENTRY}: name: expected a string that is not empty, got {shown(name)}"
        raise DataError(msg, path=str(folder / ENTRY))
    return name


def folder_name(name: str) -> str:
    """Folder name for a prefix that every file system takes; different names give different folders."""
    if PORTABLE.fullmatch(name) and name.partition(".")[0] not in RESERVED:
        return name
    like = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40].strip("_-") or "prefix"
    return f"{like}-{name_hash(name)[:16]}"


def check_links_stay_inside(root: Path, folder: Path) -> None:
    """Raise `DataError` if a folder or one of its files is a link out of ``root`` or a special file.

    A link could make the import read files that the sender of the adapter cannot read.
    """
    real_root = os.path.realpath(root)
    for path in (folder, *_listed(folder)):
        try:
            real = os.path.realpath(path, strict=True)
            mode = Path(real).stat().st_mode
        except OSError as e:
            msg = f"{path.name}: a broken link: {e.strerror}"
            raise DataError(msg, path=str(path)) from e
        if os.path.commonpath((real, real_root)) != real_root:
            msg = f"{path.name}: a link that leads out of {root}; replace the link by a copy"
            raise DataError(msg, path=str(path))
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            msg = f"{path.name}: neither a file nor a folder"
            raise DataError(msg, path=str(path))


def _listed(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []
