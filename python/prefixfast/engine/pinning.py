"""`PrefixPinning`, the methods of `Engine` that pin, evict and list prefixes in the KV arena."""

from __future__ import annotations

import re

from prefixfast.engine.driver import LoopDriver
from prefixfast.engine.kv_arena import bytes_per_row
from prefixfast.engine.loop import Loop
from prefixfast.engine.prefix_cache import Resident
from prefixfast.engine.request_prefixes import assign_prefixes, attended
from prefixfast.errors import ConfigError, UnknownPrefixError, did_you_mean, shown
from prefixfast.model.base import Model
from prefixfast.prefix.compatibility import check_fits, described
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore, StoredPrefix


class PrefixPinning:
    """Pins, evictions and the list of resident prefixes."""

    model: Model
    loop: Loop
    driver: LoopDriver
    store: PrefixStore | None

    def pin(self, prefix: Prefix | StoredPrefix | str) -> None:
        """Pin a prefix: load it now if there is room, and evict it only if no other prefix can be evicted.

        Args:
            prefix: Prefix, entry of the store, or name in the store. A name means the version that is the newest now.

        Raises:
            UnknownPrefixError: For a name that the store does not have.
            BaseMismatchError: For a prefix of another base model.
        """
        found = self._find(prefix)
        self.driver.between_steps("pin", lambda: self.loop.set_pinned(found, True))

    def unpin(self, prefix: Prefix | StoredPrefix | str) -> None:
        """Undo `pin`.

        Args:
            prefix: Prefix, entry of the store, or name in the store.

        Raises:
            UnknownPrefixError: For a name that the store does not have.
        """
        found = self._find(prefix)
        self.driver.between_steps("unpin", lambda: self.loop.set_pinned(found, False))

    def evict(self, prefix: Prefix | StoredPrefix | str) -> bool:
        """Forget a prefix: set its rows in the KV arena to zero, and release its copy in host memory.

        Args:
            prefix: Prefix, entry of the store, name in the store, or digest. A digest also names a prefix that the
                store has deleted.

        Returns:
            Whether the prefix is gone. If requests use it, it is evicted when the last of them has ended.

        Raises:
            UnknownPrefixError: For a string that is neither a name in the store nor a digest.
        """
        known = isinstance(prefix, str) and self.store is not None and prefix in self.store
        if isinstance(prefix, str) and not known and not re.fullmatch(r"[0-9a-f]{64}", prefix):
            msg = f"evict: expected a prefix, a name in the store or a digest of 64 hex digits, got {shown(prefix)}"
            msg += f"; {hint}" if (hint := did_you_mean(prefix, self.store or ())) else ""
            raise UnknownPrefixError(msg)
        digest = self._find(prefix).digest if known or not isinstance(prefix, str) else prefix
        return self.driver.between_steps("evict", lambda: self.loop.evict(digest))

    def resident(self) -> list[Resident]:
        """Prefixes in the KV arena, or on their way there."""
        row_bytes = bytes_per_row(self.model)
        return self.driver.between_steps("resident", lambda: self.loop.prefix_cache.resident(row_bytes))

    def _find(self, prefix: Prefix | StoredPrefix | str) -> Prefix | StoredPrefix:
        found = attended(assign_prefixes([[]], [prefix], self.store)[0])
        if len(found) != 1:
            msg = f"prefix: expected one Prefix or name in the store, got {shown(prefix)}"
            raise ConfigError(msg)
        check_fits(self.model, found[0], described(found[0]))
        return found[0]
