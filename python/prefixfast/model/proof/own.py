"""The model's own forward, with its own attention, on one sequence at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixfast.attention.hf_interface import NAME
from prefixfast.attention.plan import LayerKV
from prefixfast.model.attention_switch import configs_of
from prefixfast.model.dry_run import FAILURES, LayerShape
from prefixfast.model.proof.cases import Cases, RandomPrefix


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, names: Sequence[str | None]) -> Iterator[None]:
    """Context manager in which an attached model computes attention by implementations of transformers.

    Args:
        model: Attached model.
        names: Implementation of each config.
    """
    configs = configs_of(model)
    try:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation_internal = name
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = NAME


@torch.no_grad()
def own_logits(
    model: PreTrainedModel,
    cases: Cases,
    kv: Sequence[Sequence[LayerKV]],
    shapes: Sequence[LayerShape],
    implementations: Sequence[str | None],
) -> list[Tensor | None]:
    """Logits ``[N, V]`` of every sequence, None for a prefix that the model's cache does not take.

    Attention is "eager", which is complete: "sdpa" has no soft cap. A model that cannot run it keeps its own.

    Args:
        model: Attached model.
        cases: Sequences.
        kv: Keys and values ``[P, H, D]`` by layer of each random prefix.
        shapes: Heads of every layer.
        implementations: Attention implementation of each config before the model was attached.
    """
    try:
        return _all_logits(model, cases, kv, shapes, ["eager"] * len(implementations))
    except FAILURES:
        return _all_logits(model, cases, kv, shapes, implementations)


def _all_logits(
    model: PreTrainedModel,
    cases: Cases,
    kv: Sequence[Sequence[LayerKV]],
    shapes: Sequence[LayerShape],
    implementations: Sequence[str | None],
) -> list[Tensor | None]:
    with attention_of(model, implementations):
        text = _logits(model, cases.plain[0].ids)
        after = [
            _logits_after(model, c.ids, prefix, rows, shapes)
            for c, prefix, rows in zip(cases.after_random, cases.random, kv, strict=True)
        ]
    return [text, text[: len(cases.plain[1].ids)], text[cases.split :], *after]


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits ``[N, V]`` of a text without a cache."""
    tokens = ids[None]
    logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return logits


def _logits_after(
    model: PreTrainedModel, ids: Tensor, prefix: RandomPrefix, kv: Sequence[LayerKV], shapes: Sequence[LayerShape]
) -> Tensor | None:
    """Logits ``[N, V]`` after a prefix in a `DynamicCache`, None if the model's cache has another form.

    Layers that read the keys of another layer have no entry in the cache.
    """
    filled: list[Any] = [
        (k.transpose(0, 1)[None], v.transpose(0, 1)[None]) if s.source is None else (None, None)
        for (k, v), s in zip(kv, shapes, strict=True)
    ]
    positions = torch.arange(prefix.pos_start, prefix.pos_start + len(ids), device=ids.device)[None]
    try:
        logits: Tensor = model(
            input_ids=ids[None],
            past_key_values=DynamicCache(filled),
            attention_mask=torch.ones(1, prefix.rows + len(ids), dtype=torch.long, device=ids.device),
            position_ids=positions,
            use_cache=True,
        ).logits[0]
    except FAILURES:
        return None
    return logits
