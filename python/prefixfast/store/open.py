"""`open_store`, the store of an argument that takes a store or its path."""

from __future__ import annotations

import os
from pathlib import Path

from prefixfast.errors import ConfigError, shown
from prefixfast.store.store import BUCKETS, PrefixStore

OWN_FOLDERS = ".prefixfast-"  # start of the names of a store's folders beside those of its prefixes


def open_store(store: object, *, read_only: bool) -> PrefixStore | None:
    """The store that a caller gave, or the store at a path; None for None.

    Args:
        store: Argument of the caller.
        read_only: Whether a store that is given by its path is opened read-only.

    Raises:
        ConfigError: If the argument is something else, or the path is not that of a store.
    """
    if store is None or isinstance(store, PrefixStore):
        return store
    if isinstance(store, str | os.PathLike):
        return PrefixStore(store, read_only=read_only)
    msg = f"store: expected a PrefixStore or the path of one, got {shown(store)}"
    raise ConfigError(msg)


def is_store(folder: Path) -> bool:
    """Whether a folder has content of a store; an empty folder has none."""
    return any(p.name in BUCKETS or p.name.startswith(OWN_FOLDERS) for p in folder.iterdir() if p.is_dir())
