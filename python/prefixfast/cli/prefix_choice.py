"""`PrefixChoice`, prefixes by what the user typed: names in a store, or folders and hub ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixfast.cli.prefix_flags import Header, PrefixFlags, header_of
from prefixfast.errors import DataError, UnknownPrefixError, shown, suggestion

if TYPE_CHECKING:
    from prefixfast.model.base import Model
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.store import StoredPrefix

NAMES_OF_STORE = "With --store it is a name in the store."
NamedStore = Annotated[
    Path | None, typer.Option("--store", help="Folder of a store with the prefixes.", show_default="no store")
]


class PrefixChoice:
    """Prefixes by the names that the user gives them. Their tensors are read when one is used.

    Args:
        names: Names in the store, or folders and hub ids without a store.
        store: Folder of the store, None without a store.

    Attributes:
        model: Base model, from which embeddings of virtual tokens get their keys and values; None before it is loaded.

    Raises:
        UnknownPrefixError: If the store does not have a name.
        DataError: If a folder holds no prefix, or trained weights, which answer no single request.
        ConfigError: If the folder of the store is none.
    """

    def __init__(self, names: Sequence[str], store: Path | None) -> None:
        self.store = PrefixFlags(names, None, store).open_store()
        self.model: Model | None = None
        self._headers = {name: header_of(name, self.store) for name in names}
        self._read: dict[str, Prefix] = {}

    def find(self, name: str) -> Prefix | StoredPrefix:
        """Prefix of a name; of a store its newest version.

        Args:
            name: Name in the store. Without a store a name that was given before, the last part of one, or a folder or
                hub id that is read now.

        Raises:
            UnknownPrefixError: If there is no such name.
            DataError: If a folder holds no prefix.
        """
        if self.store is not None:
            return self.store.info(name)
        ends = [given for given in self._headers if Path(given).name == name]
        known = name if name in self._headers or len(ends) != 1 else ends[0]
        if known not in self._read:
            from prefixfast.prefix.prefix import Prefix

            header = self._headers.get(known) or self._new_header(name)
            self._read[known] = Prefix.from_pretrained(header.folder, model=self.model)
            self._headers[known] = header
        return self._read[known]

    def headers(self) -> list[Header]:
        """Headers of the prefixes given at the start, in their order."""
        return list(self._headers.values())

    def names(self) -> list[str]:
        """All names in the store, sorted, or the names given so far."""
        return list(self._headers) if self.store is None else sorted(self.store)

    def base(self, model: str | None) -> str:
        """Base model of a command.

        Args:
            model: Base model that the user gave, None for the one that the prefixes given at the start name.

        Raises:
            ConfigError: If the prefixes name no base model, or several.
        """
        if model is not None:
            return model
        from prefixfast.engine.call_checks import only_base_name

        return only_base_name(header.base for header in self._headers.values())

    def _new_header(self, name: str) -> Header:
        """Header of a folder that was not given before; a misspelt name is told from a missing folder."""
        try:
            return header_of(name, self.store)
        except DataError as e:
            if self._headers and not Path(name).exists():
                msg = f"no prefix {shown(name)}; {suggestion(name, [Path(given).name for given in self._headers])}"
                raise UnknownPrefixError(msg) from e
            raise
