"""`generate` and `score`: an engine for one call, over the base that this process keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import LogitsProcessorList

from prefixfast.config import EngineConfig, GenerationParams, unknown_option
from prefixfast.data.encode import Input
from prefixfast.engine.engine import BASE_FIELDS, Engine
from prefixfast.engine.request import Generation
from prefixfast.engine.score import Score
from prefixfast.errors import ConfigError
from prefixfast.model.shared_base import borrowed
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore, StoredPrefix


def generate(
    batch: Sequence[Input],
    prefixes: Any = None,
    *,
    model: Any = None,
    store: PrefixStore | str | Path | None = None,
    params: GenerationParams | None = None,
    logits_processor: LogitsProcessorList | None = None,
    on_error: Literal["raise", "return"] = "raise",
    progress: bool | None = None,
    **fields: Any,
) -> list[Generation]:
    """Generate for one batch of requests, each with its own prefixes; see `Engine.generate`.

    Args:
        batch: See `Engine.generate`.
        prefixes: See `Engine.generate`.
        model: The base; None: the one that the prefixes name.
        store: Where prefixes that are given by name lie.
        params: See `Engine.generate`.
        logits_processor: See `Engine.generate`.
        on_error: See `Engine.generate`.
        progress: See `Engine.generate`.
        fields: Fields of `GenerationParams` and `EngineConfig` (``seed`` is that of the requests).

    Returns:
        One `Generation` a request, in order.

    Raises:
        RequestError: For a bad request, before any work.
        ConfigError: For arguments that do not fit.
        BaseMismatchError: For a prefix of another base.
        UnknownPrefixError: For a name that the store does not have.
        CapacityError: If a request can never fit.

    Example:
        >>> tea, rain = generate(["Write about tea.", "Write about rain."], [prefix, None], model=base, max_new_tokens=4)
        >>> tea.usage["prefix_rows"], rain.usage["prefix_rows"], len(rain.token_ids) <= 4
        (14, 0, True)
    """
    own, engine_fields = _split(fields, GenerationParams.names(), "generate")
    with _engine(model, prefixes, batch, store, engine_fields) as engine:
        return engine.generate(
            batch,
            prefixes,
            params=params,
            logits_processor=logits_processor,
            on_error=on_error,
            progress=progress,
            **own,
        )


def score(
    batch: Sequence[Input],
    prefixes: Any = None,
    *,
    targets: Sequence[str | list[int]] | None = None,
    model: Any = None,
    store: PrefixStore | str | Path | None = None,
    end_token: bool = False,
    **fields: Any,
) -> list[Score]:
    """Log-probabilities of targets, each request with its own prefixes; see `Engine.score`.

    Args:
        batch: See `Engine.score`.
        prefixes: See `Engine.score`.
        targets: See `Engine.score`.
        model: The base; None: the one that the prefixes name.
        store: Where prefixes that are given by name lie.
        end_token: See `Engine.score`.
        fields: Fields of `EngineConfig`.

    Returns:
        One `Score` a request, in order.

    Raises:
        RequestError: For a bad request or target.
        ConfigError: For arguments that do not fit.
        BaseMismatchError: For a prefix of another base.
        UnknownPrefixError: For a name that the store does not have.

    Example:
        >>> found = score(["The capital of France is"], prefix, targets=[" Paris"], model=base)[0]
        >>> len(found.token_logprobs), found.logprob < 0
        (6, True)
    """
    _, engine_fields = _split(fields, (), "score")
    with _engine(
        model, prefixes, batch, store, engine_fields | {"kv_cache_memory": None, "max_num_seqs": 1, "max_model_len": 2}
    ) as engine:
        return engine.score(batch, prefixes, targets=targets, end_token=end_token)


def _split(fields: dict[str, Any], own: tuple[str, ...], what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    known = (*own, *EngineConfig.names())
    for name in fields:
        if name not in known:
            raise ConfigError(unknown_option(name, known, what))
    mine = {name: value for name, value in fields.items() if name in own}
    return mine, {name: value for name, value in fields.items() if name not in own}


@contextlib.contextmanager
def _engine(model: Any, prefixes: Any, batch: Any, store: Any, fields: dict[str, Any]) -> Iterator[Engine]:
    opened = PrefixStore(store, read_only=True) if isinstance(store, str | Path) else store
    base = {name: fields[name] for name in BASE_FIELDS if name in fields}
    with (
        borrowed(model if model is not None else _base_of(prefixes, batch, opened), **base) as loaded,
        Engine(loaded, store=opened, **fields) as engine,
    ):
        yield engine


def _base_of(prefixes: Any, batch: Any, store: PrefixStore | None) -> str:
    """The one base that these prefixes were made for."""
    if prefixes is None and store is not None and isinstance(batch, Sequence):
        prefixes = [row["prefix"] for row in batch if isinstance(row, Mapping) and row.get("prefix") in store]
    if isinstance(prefixes, Mapping) and not isinstance(prefixes, PrefixStore):
        prefixes = list(prefixes.values())
    flat = [p for entry in _listed(prefixes) for p in _listed(entry)]
    found = [store.info(p) if isinstance(p, str) and store is not None else p for p in flat]
    names = {
        str(p.base["name"]) for p in found if isinstance(p, Prefix | StoredPrefix) and p.base and p.base.get("name")
    }
    if len(names) != 1:
        msg = f"model: expected a base, or prefixes that name one, got {sorted(names) or 'none'}"
        raise ConfigError(msg)
    return names.pop()


def _listed(entry: Any) -> list[Any]:
    return list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
