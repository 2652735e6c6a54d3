"""`PrefixStore`: prefixes by name in a directory that several processes can use."""

from prefixfast.store.entry import StoredPrefix
from prefixfast.store.open import open_store
from prefixfast.store.reports import Check, Outcome, Receipt
from prefixfast.store.store import PrefixStore

__all__ = ["Check", "Outcome", "PrefixStore", "Receipt", "StoredPrefix", "open_store"]
