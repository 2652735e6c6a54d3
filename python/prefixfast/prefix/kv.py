"""The keys and values of whole prefixes, and of texts, as lists by layer, in the form that a packed forward takes.

Shape letters: P rows of a prefix, L layers, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import Arena, LayerKV, PrefixRows, prefix_rows, training_plan
from prefixfast.model.attach import LayerShape
from prefixfast.model.base import Model
from prefixfast.prefix.record import PrefixData


def kv_of(prefix: PrefixData, shapes: Sequence[LayerShape]) -> list[LayerKV]:
    """A prefix's tensors as a list by layer, without rows in layers that it leaves out."""
    like = next(iter(prefix.kv.values()))
    empty = [like.new_empty(0, s.num_kv_heads, s.head_dim) for s in shapes]
    return [(prefix.kv.get(f"self.{i}.k", none), prefix.kv.get(f"self.{i}.v", none)) for i, none in enumerate(empty)]


def rows_of(prefixes: Sequence[PrefixData], num_layers: int) -> PrefixRows:
    """Where the rows of `stacked` prefixes lie."""
    return prefix_rows([(p.layers, p.length, p.pos_start, p.window == "slide") for p in prefixes], num_layers)


def stacked(prefixes: Sequence[PrefixData], shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
    """By layer the keys and values of prefixes one after the other, each layer's without those that leave it out."""
    none = [torch.empty(0, s.num_kv_heads, s.head_dim, dtype=dtype, device=device) for s in shapes]
    kvs = [kv_of(p, shapes) for p in prefixes]

    def side(layer: int, j: int) -> Tensor:
        return torch.cat([none[layer], *(kv[layer][j].detach().to(device, dtype) for kv in kvs)])

    return [(side(i, 0), side(i, 1)) for i in range(len(shapes))]


@torch.no_grad()
def text_kv(model: Model, ids: Sequence[int], length: int, *, after: Sequence[PrefixData] = ()) -> list[LayerKV]:
    """Keys and values of a text in the base itself, fp32 ``[P, H, D]`` a layer; a short text is repeated, a long one cut to its first P tokens.

    Args:
        model: The base.
        ids: The text's tokens, at least one.
        length: P.
        after: Prefixes before the text, left to right.
    """
    tokens = torch.tensor((list(ids) * length)[:length], device=model.device)
    first, number = sum(p.length for p in after), np.arange(len(after), dtype=np.int32)
    indptr, rows = np.array([0, len(after)], np.int32), rows_of(after, len(model.layers))
    plan = training_plan(np.array([length], np.int32), indptr, number, rows, None, backend=model.backend, device=model.device)

    def with_room(before: Tensor) -> Tensor:
        return torch.cat([before, before.new_empty(first + length - len(before), *before.shape[1:])])

    layers = [(with_room(k), with_room(v)) for k, v in stacked(after, model.layers, model.dtype, model.device)]
    slots = torch.arange(first, first + length, dtype=torch.int32, device=model.device)
    last = torch.tensor([length - 1], device=model.device)
    model.forward(replace(plan, arena=Arena(layers, torch.empty(0, dtype=torch.int32)), slots=slots, logits_at=last), tokens)
    dtype = parameter_dtype(model.dtype)
    return [(k[first:].to(dtype), v[first:].to(dtype)) for k, v in layers]


def parameter_dtype(compute: torch.dtype) -> torch.dtype:
    """The dtype of trained tensors: fp32, fp64 where the base computes in fp64."""
    return torch.float64 if compute == torch.float64 else torch.float32
