"""The keys and values of whole prefixes, and of texts, as lists by layer, in the form that a packed forward takes.

Shape letters: P rows of a prefix, L layers, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefixfast.attention.plan import LayerKV, PrefixRows, prefix_rows
from prefixfast.model.attach import LayerShape
from prefixfast.model.base import Model
from prefixfast.prefix.record import PrefixData


def kv_by_layer(prefix: PrefixData, shapes: Sequence[LayerShape]) -> list[LayerKV]:
    """A prefix's tensors as a list by layer, without rows in layers that it leaves out."""
    like = next(iter(prefix.kv.values()))
    empty = [like.new_empty(0, s.num_kv_heads, s.head_dim) for s in shapes]
    return [(prefix.kv.get(f"self.{i}.k", none), prefix.kv.get(f"self.{i}.v", none)) for i, none in enumerate(empty)]


def row_table(prefixes: Sequence[PrefixData], num_layers: int) -> PrefixRows:
    """Where the rows of `concat_kv` prefixes lie."""
    return prefix_rows([(p.layers, p.length, p.pos_start, p.window == "slide") for p in prefixes], num_layers)


def concat_kv(
    prefixes: Sequence[PrefixData], shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device
) -> list[LayerKV]:
    """By layer the keys and values of prefixes one after the other, each layer's without those that leave it out."""
    none = [torch.empty(0, s.num_kv_heads, s.head_dim, dtype=dtype, device=device) for s in shapes]
    kvs = [kv_by_layer(p, shapes) for p in prefixes]

    def side(layer: int, j: int) -> Tensor:
        return torch.cat([none[layer], *(kv[layer][j].detach().to(device, dtype) for kv in kvs)])

    return [(side(i, 0), side(i, 1)) for i in range(len(shapes))]


def context(prefixes: Sequence[PrefixData], model: Model) -> tuple[list[LayerKV], PrefixRows]:
    """Keys and values of composed prefixes in the model's dtype, and the place of each prefix in them: what `text_kv` takes."""
    return concat_kv(prefixes, model.layers, model.dtype, model.device), row_table(prefixes, len(model.layers))
