"""`PrefixStore`, a directory of prefixes by name; a version of a prefix appears and disappears atomically.

The folder ``{2 hex digits}/{SHA-256 of the name}/{version}/`` holds the files of `Prefix.save_pretrained` and
``entry.json``, which tells about a prefix without reading its tensors. A version is written in ``.prefixfast-work`` and
renamed into place. A removed version is renamed to there first. `prefixfast.store.runs` describes the folders of
training runs. This module imports no torch until tensors are read.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar, overload

from prefixfast.errors import ConfigError, DataError, UnknownPrefixError, check_flag, did_you_mean, shown
from prefixfast.io.atomic import identity, sync_folder, write_file
from prefixfast.io.paths import as_path
from prefixfast.prefix.names import WEIGHTS_USE
from prefixfast.store.entry import ENTRY, StoredPrefix, entry_bytes, name_hash, parse_entry, read_entry, read_name
from prefixfast.store.import_export import check_export_arguments, export_all, read_adapters
from prefixfast.store.removal import RemovedVersions, remove_versions
from prefixfast.store.reports import Check, Outcome, Receipt
from prefixfast.store.runs import is_mentioned, remove_names
from prefixfast.store.verify import checked_places, verify
from prefixfast.store.versions import publish_version, read_all, read_newest, remove_old_versions, version_folders
from prefixfast.store.workspace import sweep, workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixfast.model.base import Model
    from prefixfast.prefix.prefix import Prefix

WORK = ".prefixfast-work"
BUCKETS = tuple(f"{i:02x}" for i in range(256))
D = TypeVar("D")

NAMES_COMPARED = 1000  # names that an unknown name is compared with


class PrefixStore(Mapping[str, "Prefix"]):
    """Prefixes by name in a directory that several processes can use at once; a name is any non-empty string.

    Readers get a complete version, whenever writers write or are killed. The store keeps the newest ``keep_versions``
    versions of a name. A process that reads a version while several newer ones are put needs a larger number.

    Example:
        >>> import tempfile, torch
        >>> from prefixfast import Prefix
        >>> store = PrefixStore(tempfile.mkdtemp())
        >>> prefix = Prefix({"self.0.k": torch.ones(3, 2, 4), "self.0.v": torch.ones(3, 2, 4)}, pos_start=3)
        >>> store.put("ann", prefix).version
        1
        >>> store["ann"].digest == store.info("ann").digest == prefix.digest
        True
        >>> list(store), store.delete("ann").files, list(store)
        (['ann'], 4, [])

    Args:
        path: Directory of the store; created if it does not exist, unless ``read_only``.
        read_only: Whether to refuse all writes.
        keep_versions: Number of versions of a name that the store keeps, at least 1.

    Attributes:
        path: Absolute path of the directory.
        read_only: Whether all writes are refused.
        keep_versions: Number of versions of a name that the store keeps.

    Raises:
        ConfigError: If the path is a file or cannot be created, or does not exist and the store is read-only.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, keep_versions: int = 2) -> None:
        check_flag("read_only", read_only)
        self.path, self.read_only, self.keep_versions = as_path("store", path).absolute(), read_only, keep_versions
        self._names: dict[str, str] = {}  # names by hash, of the folders read so far
        if type(keep_versions) is not int or keep_versions < 1:
            msg = f"keep_versions: expected a number of at least 1, got {shown(keep_versions)}"
            raise ConfigError(msg)
        try:
            if not read_only:
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            msg = f"store: expected a directory, got {shown(str(self.path))}: {e}"
            raise ConfigError(msg) from e
        if not self.path.is_dir():
            msg = f"store: expected a directory, got {shown(str(self.path))}"
            raise ConfigError(msg)
        if not read_only:
            sweep(self.path / WORK)

    # ---- reading ----

    def info(self, name: str) -> StoredPrefix:
        """The newest version of a name, without reading its tensors.

        Args:
            name: Name of the prefix.

        Raises:
            UnknownPrefixError: If there is no such name.
            DataError: If the entry of the version is damaged; `rollback` restores the version before.
        """
        found = read_newest(self._folder(name), read_entry)
        return found if found is not None else self._raise_unknown(name)

    def versions(self, name: str) -> list[StoredPrefix]:
        """All versions of a name, oldest first, without reading their tensors.

        Args:
            name: Name of the prefix.

        Raises:
            UnknownPrefixError: If there is no such name.
            DataError: If an entry is damaged.
        """
        return read_all(self._folder(name), read_entry) or self._raise_unknown(name)

    @overload
    def get(self, name: str) -> Prefix | None: ...

    @overload
    def get(self, name: str, default: D) -> Prefix | D: ...

    def get(self, name: str, default: Prefix | D | None = None) -> Prefix | D | None:
        """Read the newest version of a name.

        Args:
            name: Name of the prefix.
            default: Value to return if there is no such name.

        Returns:
            Prefix, or ``default`` if there is no such name.

        Raises:
            DataError: If the version is damaged.
        """
        try:
            return self[name]
        except UnknownPrefixError:
            return default

    def __getitem__(self, name: str) -> Prefix:
        found = read_newest(self._folder(name), lambda folder: read_entry(folder).read_here())
        return found if found is not None else self._raise_unknown(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(name) and bool(version_folders(self._folder(name)))

    def __iter__(self) -> Iterator[str]:
        for folder in self.folders():
            if folder.name not in self._names:
                if (found := read_newest(folder, read_name)) is None:
                    continue
                self._names[folder.name] = found
            yield self._names[folder.name]

    def __len__(self) -> int:
        return sum(1 for _ in self.folders())

    def folders(self) -> Iterator[Path]:
        """Folders of all names in the order of their hashes; each holds at least one version."""
        for bucket in BUCKETS:
            try:
                with os.scandir(self.path / bucket) as entries:
                    names = sorted(e.name for e in entries if len(e.name) == 64 and e.is_dir())
            except OSError:
                continue
            yield from (self.path / bucket / name for name in names)

    def scan(self) -> Iterator[StoredPrefix | Outcome]:
        """The newest version of every name without its tensors, or an `Outcome` with the reason if it is damaged."""
        for folder in self.folders():
            try:
                if (found := read_newest(folder, read_entry)) is not None:
                    yield found
            except DataError as e:
                yield Outcome(None, str(folder.relative_to(self.path)), False, str(e))

    # ---- writing ----

    def put(self, name: str, prefix: Prefix) -> StoredPrefix:
        """Save a prefix as the newest version of a name; versions beyond ``keep_versions`` are removed.

        Args:
            name: Name of the prefix, a non-empty string.
            prefix: Prefix to save.

        Returns:
            New version.

        Raises:
            ConfigError: If the store is read-only, the name is empty, or ``prefix`` is not a `Prefix`.
            OSError: If a write fails, for example on a full disk; all earlier versions are intact.
        """
        from prefixfast.prefix.prefix import Prefix
        from prefixfast.prefix.tuned_weights import TunedWeights

        folder = self._writable(name)
        kind: type = type(prefix)
        if not issubclass(kind, Prefix):
            advice = WEIGHTS_USE if issubclass(kind, TunedWeights) else "Prefix.from_pretrained reads a folder"
            msg = f"prefix: expected a Prefix, got {kind.__name__}; {advice}"
            raise ConfigError(msg)
        entry = entry_bytes(name, prefix)
        with workspace(self.path / WORK) as work:
            new = work / "name" / "new"
            new.parent.mkdir()
            prefix.save_pretrained(new)
            write_file(new / ENTRY, entry)
            sync_folder(new)
            target = publish_version(new, folder)
            remove_old_versions(folder, self.keep_versions, work)
        self._names[folder.name] = name
        return parse_entry(json.loads(entry), target)

    def rollback(self, name: str, version: int | None = None) -> StoredPrefix:
        """Put an earlier version again, as the newest version; the version that was the newest stays before it.

        Args:
            name: Name of the prefix.
            version: Number of the earlier version. None takes the version before the newest.

        Returns:
            New version.

        Raises:
            ConfigError: If the store is read-only, or there is no earlier version.
            UnknownPrefixError: If there is no such name or version.
            DataError: If the earlier version is damaged; the store is unchanged.
        """
        folder = self._writable(name)
        while True:
            numbers = {int(v.name): v for v in version_folders(folder)} or self._raise_unknown(name)
            if version is None and len(numbers) == 1:
                msg = f"{shown(name)} has no version before {max(numbers)}; put another, or keep more (keep_versions)"
                raise ConfigError(msg)
            number = sorted(numbers)[-2] if version is None else version
            if type(number) is not int or number not in numbers:
                has = ", ".join(map(str, sorted(numbers)))
                msg = f"{shown(name)} has no version {shown(number)} in {self.path}; it has {has}"
                raise UnknownPrefixError(msg)
            before = identity(numbers[number])
            try:
                return self.put(name, read_entry(numbers[number]).read_here())
            except DataError:
                if identity(numbers[number]) == before is not None:  # else another process has removed or replaced it
                    raise

    def delete(self, name: str) -> Receipt:
        """Remove all versions of a name at once, and its rows from the checkpoints of training runs in the store.

        Args:
            name: Name of the prefix.

        Returns:
            Digests, number and size of the removed files, and the folder of this store, since copies elsewhere stay.
            `verify` with ``absent`` and ``also`` proves that a digest is gone from given places.

        Raises:
            ConfigError: If the store is read-only.
            UnknownPrefixError: If there is no such name.
            OSError: If a file cannot be removed. The name is removed in any case, and the next writer tries again.
        """
        folder = self._writable(name)
        is_stored = name in self
        if not is_stored and not is_mentioned(self.path, name):
            self._raise_unknown(name)
        self._names.pop(folder.name, None)
        gone = remove_versions(folder, self.path / WORK) if is_stored else RemovedVersions()
        if gone is None:  # another process was faster
            self._raise_unknown(name)
        removed = remove_names(self.path, [name])
        return Receipt(
            folder.name,
            gone.digests,
            gone.files + removed.files,
            gone.bytes + removed.bytes,
            datetime.now(UTC).isoformat(timespec="seconds"),
            str(self.path),
            removed.checkpoints,
            removed.running,
        )

    # ---- many at a time ----

    def verify(self, *, absent: str | None = None, also: Iterable[str | os.PathLike[str]] = ()) -> Check:
        """Read every version and compare it with its entry.

        Args:
            absent: Digest of a deleted prefix. Every file of the store is searched for the digest, and every folder
                with tensors for the prefix. None skips the search.
            also: Further folders to search, for example the output folder of a training run, which has copies of the
                prefix and checkpoints.

        Returns:
            Damaged versions, files that hold the absent digest, and the folders that were searched.

        Raises:
            ConfigError: If ``absent`` is not a digest, or ``also`` is given without it or has a path of no folder.
        """
        return verify(self.path, self.folders(), absent, checked_places(also, absent))

    def import_dir(
        self, folder: str | os.PathLike[str], *, model: str | Path | PreTrainedModel | Model | None = None
    ) -> list[Outcome]:
        """Put every adapter folder in a folder, of prefixfast or of PEFT.

        An adapter that was exported from a store gets its name in that store, other adapters that of their folder. A
        name that exists gets a new version, unless its newest version is the same prefix.

        Args:
            folder: Folder of adapter folders. Links that lead out of the folder are refused.
            model: Base model of PROMPT_TUNING and P_TUNING adapters, as `Prefix.from_pretrained` takes it.

        Returns:
            Result for each adapter folder, with the reason if it was not imported.

        Raises:
            ConfigError: If ``folder`` is not a folder or is an adapter folder itself, or the store is read-only.
            OSError: If a write fails, for example on a full disk.
        """
        self._check_writable()
        return [
            one if isinstance(one, Outcome) else self._import(*one)
            for one in read_adapters(as_path("folder", folder), model)
        ]

    def export_dir(self, folder: str | os.PathLike[str], names: Iterable[str] | None = None) -> list[Outcome]:
        """Write the newest versions as adapter folders, which PEFT can read if it can hold the prefix.

        A folder has the name of its prefix if every file system takes that name (lower case), else a similar name with
        a hash. ``entry.json`` in the folder holds the name of the prefix for `import_dir`.

        Args:
            folder: Target folder; created if it does not exist. Earlier exports of the same names are replaced. A name
                whose folder is something else is refused.
            names: Names to export. None exports all.

        Returns:
            Result for each name, with the folder, or the reason if it was not exported.

        Raises:
            ConfigError: If ``folder`` is a file or inside the store, or ``names`` is a single string.
            OSError: If a write fails, for example on a full disk.
        """
        root = as_path("folder", folder)
        check_export_arguments(root, self.path, names)
        chosen = list(self.scan()) if names is None else [self.info(name) for name in dict.fromkeys(names)]
        root.mkdir(parents=True, exist_ok=True)
        return export_all(self, chosen, root)

    # ---- helpers ----

    def _import(self, name: str, folder: Path, prefix: Prefix) -> Outcome:
        if self._has(name, prefix):
            return Outcome(name, str(folder), True, "the store has it", prefix.digest)
        put = self.put(name, prefix)
        return Outcome(name, str(folder), True, f"version {put.version}", put.digest)

    def _has(self, name: str, prefix: Prefix) -> bool:
        try:
            return name in self and not self.info(name).differences(prefix)
        except DataError:  # a damaged version is replaced
            return False

    def _folder(self, name: str) -> Path:
        digest = name_hash(name)
        return self.path / digest[:2] / digest

    def _check_writable(self) -> None:
        if self.read_only:
            msg = f"store {shown(str(self.path))} was opened read-only"
            raise ConfigError(msg)

    def _writable(self, name: str) -> Path:
        """Folder of a name for writing, after the folders of killed writers are removed."""
        self._check_writable()
        folder = self._folder(name)
        sweep(self.path / WORK)
        return folder

    def _raise_unknown(self, name: str) -> NoReturn:
        hint = did_you_mean(name, itertools.islice(self, NAMES_COMPARED))
        msg = f"no prefix is named {shown(name)} in {self.path}" + (f"; {hint}" if hint else "")
        raise UnknownPrefixError(msg)
