"""T5 and its relatives: a position bias by distance, which becomes a table of the attention operators.

The modules of transformers make a bias ``[1, HQ, T, K]``, which is as large as the scores of all packed tokens. Here
they hand on a marker instead, and the tag of each module holds the table ``[HQ, 2 * maxd + 1]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.hf_interface import NAME, TAG
from prefixfast.model.seq2seq.family import UNBOUNDED, Family, Undo
from prefixfast.model.seq2seq.site_modules import SiteModule


def _hook(_: PreTrainedModel, modules: Sequence[SiteModule], undo: Undo) -> Callable[[], None]:
    owners: dict[str, Any] = {}
    owned: list[tuple[Any, Any, Tensor]] = []  # module, owner of its bias, buckets of the distances
    for site, _layer, module in modules:
        if module.has_relative_attention_bias:
            owners[site] = module, _buckets(module)
        if site != "cross":
            owned.append((module, *owners[site]))
        undo.append(_replace_bias(module))

    @torch.no_grad()
    def refresh() -> None:
        made: dict[int, Tensor] = {}
        for module, owner, buckets in owned:
            if id(owner) not in made:
                weight = owner.relative_attention_bias.weight
                made[id(owner)] = weight[buckets.to(weight.device)].float().T.contiguous()
            module.__dict__[TAG] = module.__dict__[TAG]._replace(bias=made[id(owner)])

    refresh()
    return refresh


def _buckets(module: Any) -> Tensor:
    """Bucket of each distance from -maxd to maxd, int64. All distances beyond are in the buckets of the ends."""
    distance = module.relative_attention_max_distance
    options = {"bidirectional": not module.is_decoder, "max_distance": distance}
    options["num_buckets"] = module.relative_attention_num_buckets
    known = inspect.signature(module._relative_position_bucket).parameters  # that of UMT5 takes none
    buckets: Tensor = module._relative_position_bucket(
        torch.arange(-distance, distance + 1), **{name: value for name, value in options.items() if name in known}
    )
    return buckets


def _replace_bias(module: Any) -> Callable[[], None]:
    """Let a module hand on a marker in packed forwards; returns the function that restores it."""
    had_bias, own, marker = module.has_relative_attention_bias, module.compute_bias, torch.zeros(1)

    def compute_bias(query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        if module.config._attn_implementation == NAME:
            return marker
        if had_bias:
            bias: Tensor = own(query_length, key_length, *args, **kwargs)
            return bias
        return module.q.weight.new_zeros(1, module.n_heads, query_length, key_length)

    module.has_relative_attention_bias = True
    module.__dict__["compute_bias"] = compute_bias

    def restore() -> None:
        module.has_relative_attention_bias = had_bias
        del module.__dict__["compute_bias"]

    return restore


T5 = Family(_hook, lambda _: UNBOUNDED, has_distances=True)
