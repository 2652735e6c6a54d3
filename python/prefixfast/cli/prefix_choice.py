"""`PrefixChoice`, prefixes by what the user typed: names in a store, or folders and hub ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.read_prefix import read_prefix
from prefixfast.errors import ConfigError, DataError, UnknownPrefixError, shown, suggestion

if TYPE_CHECKING:
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.store import StoredPrefix

NAMES_OF_STORE = "With --store it is a name in the store."
NamedStore = Annotated[
    Path | None, typer.Option("--store", help="Folder of a store with the prefixes.", show_default="no store")
]


class PrefixChoice:
    """Prefixes by the names that the user gives them.

    Args:
        names: Names in the store, or folders and hub ids without a store.
        store: Folder of the store, None without a store.
        model: Base model that the user gave, None for the one that the prefixes name.
        fields: Options of the command, of which those of the base are used for a PEFT adapter of virtual tokens.

    Raises:
        UnknownPrefixError: If the store does not have a name.
        DataError: If a folder holds no prefix.
        ConfigError: If the folder of the store is none.
    """

    def __init__(
        self,
        names: Sequence[str],
        store: Path | None,
        model: str | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        from prefixfast.store import open_store

        self.model, self.fields = model, fields or {}
        self.store = open_store(store, read_only=True)
        self._read: dict[str, Prefix] = {}
        for name in names:
            self.find(name)

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
        ends = [given for given in self._read if Path(given).name == name]
        known = name if name in self._read or len(ends) != 1 else ends[0]
        if known not in self._read:
            self._read[known] = self._from_folder(name)
        return self._read[known]

    def _from_folder(self, name: str) -> Prefix:
        try:
            return read_prefix(name, self.model, self.fields)
        except DataError as e:
            if self._read and not Path(name).exists():
                msg = f"no prefix {shown(name)}; {suggestion(name, [Path(given).name for given in self._read])}"
                raise UnknownPrefixError(msg) from e
            raise

    def names(self) -> list[str]:
        """All names in the store, sorted, or the names given so far."""
        return list(self._read) if self.store is None else sorted(self.store)

    def base(self, names: Sequence[str], model: str | None) -> str:
        """Base model of a command.

        Args:
            names: Names of the command's prefixes.
            model: Base model that the user gave, None for the one that the prefixes name.

        Raises:
            ConfigError: If the prefixes name no base model, or several.
        """
        if model is not None:
            return model
        found = [base["name"] for name in names if (base := self.find(name).base) is not None]
        bases = {name for name in found if name}
        if len(bases) != 1:
            got = " and ".join(map(shown, sorted(bases))) or "no prefix that names one"
            msg = f"--model: expected a base model, or prefixes that name one, got {got}"
            raise ConfigError(msg)
        return bases.pop()
