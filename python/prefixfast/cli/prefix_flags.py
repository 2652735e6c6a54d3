"""`PrefixFlags`, the prefixes that ``--prefix``, ``--prefixes`` and ``--store`` name for a file of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from prefixfast.cli.read_prefix import read_artifact
from prefixfast.errors import ConfigError, DataError, UnknownPrefixError, shown

if TYPE_CHECKING:
    from prefixfast.engine.request_prefixes import Prefixes
    from prefixfast.prefix.header import PrefixHeader
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.prefix.tuned_weights import TunedWeights
    from prefixfast.store import PrefixStore, StoredPrefix

Header: TypeAlias = "PrefixHeader | StoredPrefix"
# Headers of all requests: of weights, of the prefixes of each request, by name, or none.
Headers: TypeAlias = "PrefixHeader | list[list[Header]] | dict[str, PrefixHeader] | None"

PREFIX = typer.Option(
    help="Folder or hub id of the prefix of all rows; with --store its name in the store. Several prefixes compose "
    "from left to right.",
    show_default="no prefix",
)
PREFIXES = typer.Option(
    help="Folder of prefix folders; the 'prefix' key of each row names one of them.", show_default="no folder"
)
STORE = typer.Option(
    help="Folder of a store; the 'prefix' key of each row, or --prefix, names a prefix in it.", show_default="no store"
)
NAMES_SHOWN = 5
# Flag that takes what a folder is, by what it is.
RIGHT_FLAG = {
    "a prefix": "--prefix {path}",
    "trained weights": "--prefix {path} to generate or score",
    "a folder of prefixes": "--prefixes {path} with a 'prefix' key in each row, or one of its folders with --prefix",
    "a folder of trained weights": "one of its folders with --prefix to generate or score",
    "a store": "--store {path} with a 'prefix' key in each row, or with --prefix NAME",
}

IMPORT = "`prefixfast prefixes add STORE NAME FOLDER` puts a prefix into a store, `prefixes import` those of a folder"
NO_STORE = "no store holds weights; `prefixfast generate` and `prefixfast score` take their folder with --prefix"
STORE_ADVICE = {"trained weights": NO_STORE, "a folder of trained weights": NO_STORE}  # for an argument STORE


@dataclass(frozen=True)
class PrefixFlags:
    """Values of the flags.

    Attributes:
        prefix: Folders or hub ids, or names in the store, of ``--prefix``.
        prefixes: Folder of ``--prefixes``.
        store: Folder of ``--store``.
    """

    prefix: Sequence[str] | None
    prefixes: Path | None
    store: Path | None

    def open_store(self) -> PrefixStore | None:
        """Store of the flags, None without one.

        Raises:
            ConfigError: If the folder is missing, or is no store.
        """
        if self.prefixes is not None and (self.prefix or self.store is not None):
            other = "--prefix" if self.prefix else "--store"
            msg = f"expected either --prefixes or {other}, got both; --prefix and --store go together"
            raise ConfigError(msg)
        if self.store is None:
            return None
        from prefixfast.store import PrefixStore

        opened = PrefixStore(self.store, read_only=True)
        check_kind("--store", self.store, "a store")
        return opened

    def headers(self, rows: Sequence[Mapping[str, Any]], store: PrefixStore | None) -> Headers:
        """Headers of the prefixes, in a form that the checks of `generate` take; of weights the header itself.

        Args:
            rows: Rows of the requests.
            store: Store of the flags.

        Raises:
            ConfigError: If a folder is something else, or a row names no folder of ``--prefixes``.
            DataError: If a folder holds no prefix.
            UnknownPrefixError: If the store does not have a name.
        """
        if self.prefix:
            if store is not None:
                return [[_stored(store, name) for name in self.prefix]] * len(rows)
            own = [read_folder_header(p) for p in self.prefix]
            return own[0] if len(own) == 1 and own[0].method is not None else [[*own]] * len(rows)
        if self.prefixes is None:
            return None
        check_kind("--prefixes", self.prefixes, "a folder of prefixes")
        names = {row.get("prefix") for row in rows if row.get("prefix") is not None} or {None}
        if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n or n == ".."]:
            got = "no 'prefix' key" if strange[0] is None else shown(strange[0])
            msg = f"--prefixes: expected a 'prefix' key in every row that names a folder in {self.prefixes}, got {got}"
            raise ConfigError(msg)
        return {n: read_folder_header(self.prefixes / n) for n in sorted(map(str, names))}


def header_of(name: str, store: PrefixStore | None) -> Header:
    """Header of one prefix.

    Args:
        name: Name in the store, or a folder or hub id without a store.
        store: Store of the prefixes, None without one.

    Raises:
        DataError: If a folder holds no prefix, or trained weights.
        ConfigError: If a folder is something else.
        UnknownPrefixError: If the store does not have a name.
    """
    from prefixfast.prefix.header import check_is_prefix

    if store is not None:
        return _stored(store, name)
    header = read_folder_header(name)
    check_is_prefix(header)
    return header


def read_prefixes(headers: Headers, model: str | None, fields: Mapping[str, Any]) -> Prefixes:
    """The prefixes of headers, each of which is read once; prefixes of a store stay unread.

    Args:
        headers: Result of `PrefixFlags.headers`.
        model: Hub id or folder of the base, None for the base that the prefixes name.
        fields: Options of the command.
    """
    from prefixfast.prefix.header import PrefixHeader

    found: dict[Path, Prefix | TunedWeights] = {}

    def read(entry: Any) -> Any:
        if not isinstance(entry, PrefixHeader):
            return entry
        if entry.folder not in found:
            found[entry.folder] = read_artifact(entry.folder, model, fields)
        return found[entry.folder]

    if isinstance(headers, PrefixHeader):
        weights: TunedWeights = read(headers)
        return weights
    if isinstance(headers, Mapping):
        return {name: read(entry) for name, entry in headers.items()}
    return [[read(entry) for entry in headers[0]]] * len(headers) if headers else None


def check_kind(flag: str, path: Path, expected: str) -> None:
    """Check that the folder of a flag is not what another flag takes.

    Args:
        flag: Flag or argument, for the error.
        path: Folder as the user gave it.
        expected: Kind of folder that the flag takes, a key of `RIGHT_FLAG`.

    Raises:
        ConfigError: If the folder is missing, or is of another kind, with the flag that takes it.
    """
    if not path.is_dir():
        got = "is a file" if path.exists() else "does not exist"
        msg = f"{flag}: expected {expected}, got {shown(str(path))}, which {got}"
        raise ConfigError(msg)
    kind = kind_of(path)
    if kind not in (expected, None):
        advice = f"give {RIGHT_FLAG[kind]}" if flag.startswith("--") else STORE_ADVICE.get(kind, IMPORT)
        msg = f"{flag}: expected {expected}, got {shown(str(path))}, which is {kind}: {advice.format(path=path)}"
        raise ConfigError(msg)


def kind_of(folder: Path) -> str | None:
    """Kind of a folder, a key of `RIGHT_FLAG`; None for a folder without prefixes."""
    from prefixfast.store.import_export import is_adapter
    from prefixfast.store.open import is_store

    if is_adapter(folder):
        return "trained weights" if _holds_weights(folder) else "a prefix"
    if is_store(folder):
        return "a store"
    if not (inside := _adapters(folder.iterdir())):
        return None
    return "a folder of trained weights" if all(map(_holds_weights, inside)) else "a folder of prefixes"


def _adapters(folders: Iterable[Path]) -> list[Path]:
    from prefixfast.store.import_export import is_adapter

    return sorted(f for f in folders if is_adapter(f))


def _holds_weights(folder: Path) -> bool:
    """Whether an adapter folder holds trained weights; a damaged one counts as a prefix, whose reader says so."""
    from prefixfast.prefix.tuned_folder import is_tuned

    try:
        return is_tuned(folder)
    except DataError:
        return False


def read_folder_header(path: str | Path) -> PrefixHeader:
    """Header of a folder or hub id.

    Args:
        path: Folder or hub id of a prefix or of trained weights.

    Raises:
        DataError: If it holds neither.
        ConfigError: If the folder is what another flag takes.
    """
    from prefixfast.prefix.header import read_header

    try:
        return read_header(path)
    except DataError as e:
        kind = kind_of(Path(path)) if Path(path).is_dir() else None
        if kind in (None, "a prefix", "trained weights"):
            raise
        inside = [f.name for f in _adapters(Path(path).iterdir())[:NAMES_SHOWN]]
        names = f" ({', '.join(map(shown, inside))})" if inside else ""
        advice = RIGHT_FLAG[str(kind)].format(path=path)
        msg = f"--prefix: expected a prefix, got {shown(str(path))}, which is {kind}{names}: give {advice}"
        raise ConfigError(msg) from e


def _stored(store: PrefixStore, name: str) -> StoredPrefix:
    try:
        return store.info(name)
    except UnknownPrefixError as e:
        if not Path(name).is_dir():
            raise
        msg = f"--prefix: {e}; there is a folder of this name, which is read without --store"
        raise UnknownPrefixError(msg) from e
