"""Keys and values that a base model computes for a text or for embeddings.

Shape letters: P rows of a prefix, L layers, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import (
    NO_PREFIXES,
    Arena,
    LayerKV,
    PrefixRows,
    PrefixUse,
    SitePrefixes,
    training_plan,
)
from prefixfast.attention.seq2seq_plan import NO_SITE_PREFIXES, seq2seq_training_plan
from prefixfast.config.sites import SITES, BySite, Site
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import by_source, readers


def text_kv(
    model: Model, ids: Sequence[int], length: int, before: Sequence[LayerKV] = (), rows: PrefixRows = NO_PREFIXES
) -> list[LayerKV]:
    """Keys and values of a text in the base model; a shorter text is repeated, a longer one cut to its first P tokens.

    Args:
        model: Base model.
        ids: Token ids of the text, at least one.
        length: Number of rows P.
        before: Keys and values ``[rows, H, D]`` by layer of the prefixes before the text; empty without prefixes. A
            layer that reads the keys of another layer has the tensors of that layer, also in the result.
        rows: Place of each prefix in ``before``, from left to right.

    Returns:
        Keys and values ``[P, H, D]`` by layer, in fp32 (fp64 for a base in fp64).
    """
    return tokens_kv(model, torch.tensor((list(ids) * length)[:length], device=model.device), before, rows)


@torch.no_grad()
def tokens_kv(
    model: Model, tokens: Tensor, before: Sequence[LayerKV] = (), rows: PrefixRows = NO_PREFIXES
) -> list[LayerKV]:
    """Keys and values of tokens in the base model.

    Args:
        model: Base model.
        tokens: Token ids, int64 ``[P]``, or embeddings ``[P, E]`` in the model's dtype.
        before: Keys and values by layer of the prefixes before the tokens, as for `text_kv`.
        rows: Place of each prefix in ``before``, from left to right.

    Returns:
        Keys and values ``[P, H, D]`` by layer, in fp32 (fp64 for a base in fp64).
    """
    length = len(tokens)
    number = np.arange(rows.table.shape[1], dtype=np.int32)
    first = int(rows.table[:, :, 1].sum(1).max(initial=0))
    indptr = np.array([0, len(number)], np.int32)
    plan = training_plan(
        np.array([length], np.int32), PrefixUse(indptr, number), rows, None, backend=model.backend, device=model.device
    )

    def with_room(i: int, j: int) -> Tensor:
        s = model.layers[i]
        rows = torch.zeros(first + length, s.num_kv_heads, s.attention_dim, dtype=model.dtype, device=model.device)
        if before:
            own = before[i][j]
            rows[: len(own), :, : own.shape[2]] = own
        return rows

    layers = by_source(model.layers, [(with_room(i, 0), with_room(i, 1)) for i in range(len(model.layers))])
    arena = Arena(layers, torch.empty(0, dtype=torch.int32), readers(model.layers))
    slots = torch.arange(first, first + length, dtype=torch.int32, device=model.device)
    last = torch.tensor([length - 1], device=model.device)
    with model.guard.running():
        model.forward(replace(plan, arena=arena, slots=slots, logits_at=last), tokens)
    dtype = parameter_dtype(model.dtype)
    made = [
        (k[first:, :, : s.head_dim].to(dtype), v[first:, :, : s.value_dim].to(dtype))
        for (k, v), s in zip(layers, model.layers, strict=True)
    ]
    return by_source(model.layers, made)


def seq2seq_text_kv(
    model: Model,
    encoder_ids: Sequence[int],
    decoder_ids: Sequence[int],
    lengths: Mapping[Site, int],
    before: Mapping[Site, SitePrefixes] = NO_SITE_PREFIXES,
) -> Mapping[Site, list[LayerKV]]:
    """Keys and values of texts in an encoder-decoder base; a shorter text is repeated, a longer one cut to P tokens.

    Encoder and cross rows are those of the source, and decoder rows those of the decoder's text after it.

    Args:
        model: Base model.
        encoder_ids: Token ids of the source, at least one.
        decoder_ids: Token ids of the decoder's text, at least one.
        lengths: Number of rows P of each site that is wanted.
        before: Prefixes that the texts attend to.

    Returns:
        Keys and values ``[P, H, D]`` by layer of each site, in fp32 (fp64 for a base in fp64).
    """

    def resized(ids: Sequence[int], site: Site) -> list[int]:
        return (list(ids) * lengths[site])[: lengths[site]]

    dtype, made = parameter_dtype(model.dtype), {}
    for site in lengths:
        texts = list(encoder_ids), list(decoder_ids[:1])
        texts = (texts[0], resized(decoder_ids, site)) if site == "self" else (resized(encoder_ids, site), texts[1])
        made[site] = [(k.to(dtype), v.to(dtype)) for k, v in _site_kv(model, *texts, before)[site]]
    return BySite(made)


@torch.no_grad()
def _site_kv(
    model: Model, encoder_ids: list[int], decoder_ids: list[int], before: Mapping[Site, SitePrefixes]
) -> Mapping[Site, list[LayerKV]]:
    """Keys and values ``[tokens, H, D]`` by layer of each site in one forward."""
    found: dict[Site, dict[int, LayerKV]] = {site: {} for site in SITES}
    number = np.arange(before["self"].rows.table.shape[1], dtype=np.int32)
    plan = seq2seq_training_plan(
        np.array([len(decoder_ids)], np.int32),
        np.array([len(encoder_ids)], np.int32),
        PrefixUse(np.array([0, len(number)], np.int32), number),
        before,
        backend=model.backend,
        device=model.device,
    ).with_probe(lambda call: found[call.site].update({call.layer: (call.k, call.v)}))
    with model.guard.running():
        model.hidden(plan, *(torch.tensor(ids, device=model.device) for ids in (decoder_ids, encoder_ids)))
    return {site: [layers[i] for i in range(len(layers))] for site, layers in found.items()}


def parameter_dtype(compute: torch.dtype) -> torch.dtype:
    """Dtype of trained tensors: fp64 for a base in fp64, else fp32."""
    return torch.float64 if compute == torch.float64 else torch.float32
