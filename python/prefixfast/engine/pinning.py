"""The part of an `Engine` that keeps prefixes by hand, apart from requests."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from prefixfast.engine.kv_arena import bytes_of_row
from prefixfast.engine.loop import Loop
from prefixfast.engine.prefix_cache import Resident
from prefixfast.engine.request import assign
from prefixfast.errors import UnknownPrefixError
from prefixfast.model.base import Model
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore, StoredPrefix

T = TypeVar("T")


class Residents(ABC):
    """Pins, eviction by hand, and what lies in the arena."""

    model: Model
    loop: Loop
    store: PrefixStore | None

    @abstractmethod
    def _between_steps(self, job: Callable[[], T]) -> T:
        """Run something that uses the loop, between two steps, in the thread that owns it."""

    def pin(self, prefix: Prefix | str) -> None:
        """Load a prefix now if there is room, and evict it only when nothing else is left to evict.

        Args:
            prefix: A prefix or its name in the store: then the version that is the newest now.

        Raises:
            UnknownPrefixError: For a name that the store does not have.
            BaseMismatchError: For a prefix of another base.
        """
        found = self._found(prefix)
        self._between_steps(lambda: self.loop.keep(found, True))

    def unpin(self, prefix: Prefix | str) -> None:
        """Take `pin` of ``prefix`` back.

        Raises:
            UnknownPrefixError: For a name that the store does not have.
        """
        found = self._found(prefix)
        self._between_steps(lambda: self.loop.keep(found, False))

    def evict(self, prefix: Prefix | StoredPrefix | str) -> bool:
        """Forget a prefix: its arena rows are overwritten with zeros and its copy on the host is let go.

        Args:
            prefix: A prefix, an entry of the store, its name there, or a digest (of one that is deleted already).

        Returns:
            True: done. False: requests use it; it goes when the last of them has ended.

        Raises:
            UnknownPrefixError: For a text that is neither a name in the store nor a digest.
        """
        known = isinstance(prefix, str) and self.store is not None and prefix in self.store
        if isinstance(prefix, str) and not known and not re.fullmatch(r"[0-9a-f]{64}", prefix):
            msg = f"evict: expected a prefix, a name in the store or a digest of 64 hex digits, got {prefix!r:.80}"
            raise UnknownPrefixError(msg)
        digest = self._found(prefix).digest if known or not isinstance(prefix, str) else prefix
        return self._between_steps(lambda: self.loop.evict(digest))

    def resident(self) -> list[Resident]:
        """The prefixes that lie in the arena or are on their way there."""
        return self._between_steps(lambda: self.loop.residency.resident(bytes_of_row(self.model)))

    def _found(self, prefix: Any) -> Prefix | StoredPrefix:
        ((found,),) = assign([[]], [prefix], self.store)
        check_fits(self.model, found)
        return found
