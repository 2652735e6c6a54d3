"""`PrefixStore`: a directory of prefixes by name, each version a folder that is either wholly there or not at all.

Layout: ``{2 hex}/{SHA-256 of the name}/{version}/`` holds what `Prefix.save_pretrained` writes and ``entry.json`` (see `entry`), so that ten thousand
prefixes can be known without reading one. A version is written in ``.prefixfast-work`` and renamed into place; what is removed is renamed out of place first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, DataError, UnknownPrefixError
from prefixfast.io.atomic import sync_folder, write_file
from prefixfast.prefix.prefix import Prefix
from prefixfast.store.entry import ENTRY, StoredPrefix, entry_bytes, name_hash, parse_entry, read_entry, read_name
from prefixfast.store.import_export import check_target, export, read_adapters
from prefixfast.store.reports import Check, Outcome, Receipt
from prefixfast.store.verify import verify
from prefixfast.store.versions import read_newest, settle, version_folders
from prefixfast.store.workspace import sweep, taken_away, workspace

WORK = ".prefixfast-work"
BUCKETS = tuple(f"{i:02x}" for i in range(256))


class PrefixStore(Mapping[str, Prefix]):
    """Prefixes by name in a directory that several processes may use at once; a name is any text.

    Readers see one whole version or another, whatever writers do or whenever they are killed. A name that is put, rolled back or deleted keeps its older
    versions readable as long as ``keep_versions`` says: who may still read a version after so many more should keep more of them.

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
        path: The directory; made if it is not there, unless ``read_only``.
        read_only: Refuse to write.
        keep_versions: How many versions of a name are kept.

    Raises:
        ConfigError: For a path that is a file, cannot be made or, read-only, is not there.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, keep_versions: int = 2) -> None:
        self.path, self.read_only, self.keep_versions = Path(path).absolute(), read_only, keep_versions
        self._names: dict[str, str] = {}  # by their hashes, those that were met
        if type(keep_versions) is not int or keep_versions < 1:
            msg = f"keep_versions: expected at least 1, got {keep_versions!r}"
            raise ConfigError(msg)
        try:
            if not read_only:
                self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as e:
            msg = f"store: expected a directory, got {str(self.path)!r}: {e}"
            raise ConfigError(msg) from e
        if not self.path.is_dir():
            msg = f"store: expected a directory, got {str(self.path)!r}"
            raise ConfigError(msg)
        if not read_only:
            sweep(self.path / WORK)

    # ---- reading ----

    def info(self, name: str) -> StoredPrefix:
        """The newest version of ``name``, its tensors unread: a `StoredPrefix`.

        Args:
            name: Any text.

        Raises:
            UnknownPrefixError: If there is none.
            DataError: If its entry is damaged; `rollback` brings the version before it back.
        """
        found = read_newest(self._folder(name), read_entry)
        return found if found is not None else self._unknown(name)

    def versions(self, name: str) -> list[StoredPrefix]:
        """All versions of ``name``, oldest first, their tensors unread: each a `StoredPrefix`.

        Args:
            name: Any text.

        Raises:
            UnknownPrefixError: If there is none.
            DataError: If an entry is damaged.
        """
        found = []
        for folder in version_folders(self._folder(name)):
            try:
                found.append(read_entry(folder))
            except DataError:
                if os.path.lexists(folder):  # else another writer has dropped it
                    raise
        return found or self._unknown(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The newest version of ``name``, read; ``default`` if there is none.

        Returns:
            A `Prefix`, or ``default``.

        Raises:
            DataError: If it is damaged.
        """
        try:
            return self[name]
        except UnknownPrefixError:
            return default

    def __getitem__(self, name: str) -> Prefix:
        found = read_newest(self._folder(name), lambda folder: read_entry(folder).read_here())
        return found if found is not None else self._unknown(name)

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
        """The folders of all names, in the order of their hashes; each holds at least one version."""
        for bucket in BUCKETS:
            try:
                with os.scandir(self.path / bucket) as entries:
                    names = sorted(e.name for e in entries if len(e.name) == 64 and e.is_dir())
            except OSError:
                continue
            yield from (self.path / bucket / name for name in names)

    def scan(self) -> Iterator[StoredPrefix | Outcome]:
        """The newest version of every name, and an `Outcome` that says why for each that is damaged."""
        for folder in self.folders():
            try:
                if (found := read_newest(folder, read_entry)) is not None:
                    yield found
            except DataError as e:
                yield Outcome(None, str(folder.relative_to(self.path)), False, str(e))

    # ---- writing ----

    def put(self, name: str, prefix: Prefix) -> StoredPrefix:
        """Save a new version of ``name``, and return its `StoredPrefix`; older ones beyond ``keep_versions`` go.

        Args:
            name: Any text.
            prefix: What to save.

        Raises:
            ConfigError: If the store is read-only, the name empty or ``prefix`` something else.
            OSError: If the disk refuses; what was there before is intact.
        """
        folder = self._writable(name)
        kind: type = type(prefix)
        if not issubclass(kind, Prefix):
            msg = f"prefix: expected a Prefix, got {kind.__name__}; Prefix.from_pretrained reads a folder"
            raise ConfigError(msg)
        entry = entry_bytes(name, prefix)
        with workspace(self.path / WORK) as work:
            new = work / "name" / "new"
            new.parent.mkdir()
            prefix.save_pretrained(new)
            write_file(new / ENTRY, entry)
            sync_folder(new)
            target = settle(new, folder)
            for i, old in enumerate(version_folders(folder)[: -self.keep_versions]):
                try:
                    old.rename(work / f"old{i}")
                except OSError:  # another writer was faster, or the next one will do it
                    continue
        self._names[folder.name] = name
        return parse_entry(json.loads(entry), target)

    def rollback(self, name: str, version: int | None = None) -> StoredPrefix:
        """Make an earlier version the newest again, as a new version, a `StoredPrefix`; the version that was the newest stays as the one before it.

        Args:
            name: Any text.
            version: Its number; by default the one before the newest.

        Raises:
            ConfigError: If the store is read-only, or there is no earlier version.
            UnknownPrefixError: If there is no such name or version.
            DataError: If the earlier version is damaged; nothing is changed.
        """
        numbers = {int(v.name): v for v in version_folders(self._writable(name))} or self._unknown(name)
        if version is None and len(numbers) == 1:
            msg = f"{name!r} has no version before {max(numbers)}; put another, or keep more (keep_versions)"
            raise ConfigError(msg)
        chosen = sorted(numbers)[-2] if version is None else version
        if chosen not in numbers:
            msg = f"{name!r} has no version {chosen!r} in {self.path}; it has {', '.join(map(str, sorted(numbers)))}"
            raise UnknownPrefixError(msg)
        return self.put(name, read_entry(numbers[chosen]).read_here())

    def delete(self, name: str) -> Receipt:
        """Remove all versions of ``name``; readers see all of them or none.

        Args:
            name: Any text.

        Returns:
            What was removed; `verify` with ``absent`` shows that it is gone.

        Raises:
            ConfigError: If the store is read-only.
            UnknownPrefixError: If there is none.
            OSError: If a file cannot be removed; the name is gone all the same, and the next writer tries again.
        """
        folder = self._writable(name)
        if name not in self:
            self._unknown(name)
        try:
            with taken_away(folder, self.path / WORK) as gone:
                sync_folder(folder.parent)
                sizes = [p.lstat().st_size for p in gone.rglob("*") if not p.is_dir()]
                digests = tuple(_digest(version) for version in version_folders(gone))
        except FileNotFoundError:
            self._unknown(name)
        finally:
            self._names.pop(folder.name, None)
        return Receipt(folder.name, digests, len(sizes), sum(sizes), datetime.now(UTC).isoformat(timespec="seconds"))

    # ---- many at a time ----

    def verify(self, *, absent: str | None = None) -> Check:
        """Read every version again and compare it with its entry; a `Check` says what was found.

        Args:
            absent: Digest of a prefix of which nothing may be left: every file of the store is searched for it, every folder with tensors for the prefix.

        Raises:
            ConfigError: If ``absent`` is no digest.
        """
        return verify(self.path, self.folders(), absent)

    def import_dir(self, folder: str | os.PathLike[str]) -> list[Outcome]:
        """Put every adapter folder in ``folder`` (ours or PEFT's), under its own name if it was exported from a store, else the folder's.

        A name that is there already gets a new version, unless its newest one is the same.

        Args:
            folder: A folder of adapter folders. Links that lead out of it are refused.

        Returns:
            For each folder in it whether it was taken, and why not.

        Raises:
            ConfigError: If ``folder`` is no folder, or an adapter itself, or the store is read-only.
            OSError: If the disk refuses.
        """
        self._check_writable()
        return [one if isinstance(one, Outcome) else self._import(*one) for one in read_adapters(Path(folder))]

    def export_dir(self, folder: str | os.PathLike[str], names: Iterable[str] | None = None) -> list[Outcome]:
        """Write the newest versions as adapter folders that PEFT can read where it can hold them.

        A folder is called by its prefix's name where every file system takes that (lower case), else by a like name and a hash; ``entry.json`` in it keeps the
        real name for `import_dir`.

        Args:
            folder: Where to; made if it is not there. What it holds of the same names is replaced, anything else in the way refused.
            names: Which; by default all.

        Returns:
            For each name where it lies, or why not.

        Raises:
            ConfigError: If ``folder`` is a file or in the store, or ``names`` a single text.
            OSError: If the disk refuses.
        """
        root = Path(folder)
        check_target(root, self.path, names)
        chosen = list(self.scan()) if names is None else [self.info(name) for name in dict.fromkeys(names)]
        root.mkdir(parents=True, exist_ok=True)
        return [one if isinstance(one, Outcome) else export(self, one.name, root) for one in chosen]

    # ---- parts ----

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
            msg = f"store {str(self.path)!r} was opened read-only"
            raise ConfigError(msg)

    def _writable(self, name: str) -> Path:
        """The folder of a name that is going to be written, with nothing of killed writers beside it."""
        self._check_writable()
        folder = self._folder(name)
        sweep(self.path / WORK)
        return folder

    def _unknown(self, name: str) -> Any:
        msg = f"no prefix is named {name!r:.200} in {self.path}"
        raise UnknownPrefixError(msg)


def _digest(version: Path) -> str | None:
    """What an entry says of a version that has been moved away from its name."""
    try:
        found = json.loads((version / ENTRY).read_bytes())["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
