"""Prefixes inside the attention modules of an encoder-decoder model, by the model's own eager code.

Prefix rows are concatenated to the keys and values of each module, and the mask is written out. Nothing here uses a
plan, its tables or an operator of prefixfast.
Shape letters: T queries, K keys, P prefix rows, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from prefixfast.attention.hf_interface import TAG
from prefixfast.attention.plan import LayerKV
from prefixfast.config.sites import Site
from prefixfast.model.attention_switch import configs_of
from prefixfast.model.proof.own import attention_of
from prefixfast.model.seq2seq.positions import packed_positions
from prefixfast.model.seq2seq.site_modules import site_modules

NAME = "prefixfast-brute-force"


class _Acting(NamedTuple):
    """What attention reads: the prefix by site, and the module with the position bias of each stack, None for none."""

    kv: Mapping[Site, list[LayerKV]]
    owners: Mapping[Site, Any]


_ACTING: ContextVar[_Acting] = ContextVar("prefixfast_brute_force")


@torch.no_grad()
def brute_force_logits(
    model: PreTrainedModel, encoder_ids: Tensor, ids: Tensor, kv: Mapping[Site, list[LayerKV]], pos_start: int
) -> Tensor:
    """Logits ``[T, V]`` of one request.

    Args:
        model: Attached encoder-decoder model.
        encoder_ids: Token ids of the encoder ``[M]``.
        ids: Token ids of the decoder ``[T]``.
        kv: Keys and values ``[P, H, D]`` of the prefix by layer of each site.
        pos_start: Position of the first decoder token.
    """
    positions = torch.arange(pos_start, pos_start + len(ids), device=ids.device)[None]
    with _acting(model, kv):
        states = model.get_encoder()(input_ids=encoder_ids[None], return_dict=True).last_hidden_state
        # Own positions count from 0. The case of a prefix made of a text shows that the others are right.
        with packed_positions(positions) if pos_start else contextlib.nullcontext():
            logits: Tensor = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=ids[None], use_cache=False
            ).logits[0]
    return logits


@contextlib.contextmanager
def _acting(model: PreTrainedModel, kv: Mapping[Site, list[LayerKV]]) -> Iterator[None]:
    owners: dict[Site, Any] = {}
    for site, _, module in site_modules(model):
        if hasattr(module, "relative_attention_bias"):
            owners.setdefault(site, module)
    token = _ACTING.set(_Acting(kv, owners))
    try:
        with attention_of(model, [NAME] * len(configs_of(model))):
            yield
    finally:
        _ACTING.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, Tensor]:
    """Attention ``[1, T, H, D]`` over [prefix rows; keys] by the function of the module's own file."""
    assert attention_mask is None
    site, layer, _ = module.__dict__[TAG]
    acting, count = _ACTING.get(), query.shape[2]
    rows = 0
    if site in acting.kv:
        prefix_k, prefix_v = (t.transpose(0, 1)[None] for t in acting.kv[site][layer])
        rows = prefix_k.shape[2]
        key, value = torch.cat([prefix_k, key], 2), torch.cat([prefix_v, value], 2)
    mask = query.new_zeros(1, 1, count, key.shape[2])
    if site == "self":
        mask[..., rows:] = torch.full((count, count), -torch.inf, device=query.device).triu(1)
    bias = how.get("position_bias")
    if bias is not None and rows:
        before = bias.new_zeros(*bias.shape[:3], rows)
        if site in acting.owners:
            owner = module if hasattr(module, "relative_attention_bias") else acting.owners[site]
            before = owner.compute_bias(count, rows + count, past_seen_tokens=rows)[..., :rows]
        how["position_bias"] = torch.cat([before.to(bias), bias], -1)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out: tuple[Tensor, Tensor] = eager(module, query, key, value, mask, **how)
    return out


AttentionInterface.register(NAME, _attention)
