"""The prefixes of a run, of which those in a store are not kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prefixfast.prefix.prefix import Prefix
from prefixfast.store.entry import StoredPrefix


class EarlierPrefix(NamedTuple):
    """A prefix that an earlier run has finished.

    Attributes:
        stored: Version in the store.
        metrics: Metrics of its training.
    """

    stored: StoredPrefix
    metrics: dict[str, float]


class SavedPrefixes(Mapping[str, Prefix]):
    """Prefixes by name. One in a store is read each time that it is asked for.

    Args:
        held: Prefixes, or their versions in a store, by name.
    """

    def __init__(self, held: Mapping[str, Prefix | StoredPrefix]) -> None:
        self._held = dict(held)

    def __getitem__(self, name: str) -> Prefix:
        found = self._held[name]
        return found.read() if isinstance(found, StoredPrefix) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held
