"""Prefixes of each request of a batch, from a prefix, a sequence, a mapping or names in a store."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from prefixfast.data.encode import Input
from prefixfast.errors import ConfigError, RequestError, shown, suggestion
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import PrefixStore, StoredPrefix
from prefixfast.store.store import NAMES_COMPARED

OnePrefix: TypeAlias = Prefix | StoredPrefix | str
Assigned: TypeAlias = Prefix | StoredPrefix | TunedWeights  # weights only alone and for all requests
PrefixLike: TypeAlias = OnePrefix | Sequence[OnePrefix] | None
Prefixes: TypeAlias = PrefixLike | Sequence[PrefixLike] | Mapping[str, PrefixLike] | TunedWeights


def assign_prefixes(
    batch: Sequence[Input],
    prefixes: Prefixes,
    store: PrefixStore | None,
    types: tuple[type, ...] = (Prefix, StoredPrefix),
) -> list[tuple[Assigned, ...]]:
    """Prefixes of each request, from left to right.

    Args:
        batch: Requests.
        prefixes: One prefix for all requests; one entry per request (None, a prefix, or a sequence of prefixes from
            left to right); or a mapping of names to entries for rows with a ``prefix`` key. None means no prefix, or
            the store for rows with a ``prefix`` key. Trained weights act for all requests.
        store: Store of the prefixes that are given by name.
        types: Types of a prefix.

    Raises:
        RequestError: For a wrong entry, or a row without a known name.
        ConfigError: If ``prefixes`` is something else, or does not have one entry per request.
        UnknownPrefixError: For a name that the store does not have.
    """
    source: object = prefix_source(batch, prefixes, store)
    if is_weights(source):
        return [(source,)] * len(batch)  # type: ignore[list-item]
    if source is None or isinstance(source, (*types, str)):
        return [_check_entry(source, i, store, types) for i in range(len(batch))]
    if isinstance(source, Mapping):
        return [_check_entry(_by_name(item, i, source), i, store, types) for i, item in enumerate(batch)]
    if not isinstance(source, Sequence):
        msg = (
            "prefixes: expected a Prefix, a sequence with one entry per request, or a mapping, got "
            f"{type(source).__name__}; read a folder with Prefix.from_pretrained"
        )
        raise ConfigError(msg)
    if len(source) != len(batch):
        msg = (
            f"prefixes: expected one entry for each of the {len(batch)} requests, got {len(source)}; pass one prefix "
            "for all requests without a list"
        )
        raise ConfigError(msg)
    return [_check_entry(entry, i, store, types) for i, entry in enumerate(source)]


def is_weights(given: object) -> bool:
    """Whether something is trained weights, or the header of their folder, and no prefix."""
    return isinstance(given, TunedWeights) or isinstance(getattr(given, "method", None), str)


def attended(own: Sequence[Assigned]) -> tuple[Prefix | StoredPrefix, ...]:
    """The prefixes that a request sees, of trained weights the one that was trained with them."""
    found = (p.prefix if isinstance(p, TunedWeights) else p for p in own)
    return tuple(p for p in found if p is not None)


def weights_of(own: Sequence[Assigned]) -> TunedWeights | None:
    """Trained weights of a request, None without any."""
    return next((p for p in own if isinstance(p, TunedWeights)), None)


def prefix_source(batch: Sequence[Input], prefixes: Prefixes, store: PrefixStore | None) -> Prefixes | PrefixStore:
    """Source of the prefixes of a batch: the store for rows with a ``prefix`` key without ``prefixes``, else these."""
    is_named = any(isinstance(item, Mapping) and "prefix" in item for item in batch)
    return store if is_named and prefixes is None and store is not None else prefixes


def check_name(item: Input, index: int, source: object, *, is_text: bool) -> None:
    """Check that the ``prefix`` key of a row has one meaning.

    Args:
        item: Request.
        index: Place of the request in its batch.
        source: Source of the prefixes of the batch.
        is_text: Whether the task of the request's prefix reads the column ``prefix`` as text.

    Raises:
        RequestError: If the key is to name a prefix and no mapping has it, or if it is text that also names a prefix.
    """
    if not isinstance(item, Mapping) or "prefix" not in item or isinstance(source, Mapping) != is_text:
        return
    if is_text:
        msg = (
            f"request {index}: the prefix reads column 'prefix' as text, so that it cannot also name the prefix; pass "
            "prefixes=[...] with one entry for each request"
        )
    else:
        msg = (
            f"request {index}: the key 'prefix' of the row names its prefix, which needs prefixes to be a mapping of "
            f"names to prefixes, or a store, got {type(source).__name__}; remove or rename the column if it names none"
        )
    raise RequestError(msg, index=index)


def _by_name(item: Input, index: int, prefixes: Mapping[str, object]) -> object:
    """Entry that a row names by its ``prefix`` key."""
    name = item.get("prefix") if isinstance(item, Mapping) else None
    if not isinstance(name, str) or name not in prefixes:
        hint = suggestion(name, sorted(map(str, itertools.islice(prefixes, NAMES_COMPARED))))
        msg = f"request {index}: expected a 'prefix' key with the name of a prefix, got {shown(name)}; {hint}"
        raise RequestError(msg, index=index)
    return prefixes.info(name) if isinstance(prefixes, PrefixStore) else prefixes[name]


def _check_entry(entry: object, index: int, store: PrefixStore | None, types: tuple[type, ...]) -> tuple[Assigned, ...]:
    """Prefixes of one entry, with names looked up in the store."""
    parts: Sequence[object] = () if entry is None else (entry,)
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        parts = entry
    if store is not None:
        parts = [store.info(part) if isinstance(part, str) else part for part in parts]
    found: list[Any] = []
    for part in parts:
        if is_weights(part):
            method = getattr(part, "method", "")
            msg = (
                f"request {index}: prefix: weights of method {method!r} change the base for all requests: pass them "
                "alone to generate or score, in the place of one prefix, and not with others, by name or to submit"
            )
            raise RequestError(msg, index=index)
        if not isinstance(part, types):
            msg = (
                f"request {index}: prefix: expected a Prefix, None or a sequence of Prefix, got {shown(part)}; read a "
                "folder with Prefix.from_pretrained, or pass Engine(store=...) for names"
            )
            raise RequestError(msg, index=index)
        found.append(part)
    return tuple(found)
