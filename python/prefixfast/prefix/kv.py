"""Keys and values of whole prefixes as lists by layer, in the form that a packed forward takes.

Shape letters: P prefix rows, L layers, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefixfast.attention.plan import LayerKV, PrefixRows, prefix_rows
from prefixfast.model.base import Model
from prefixfast.model.dry_run import LayerShape
from prefixfast.prefix.record import PrefixData
from prefixfast.prefix.tensors import shared_tensors


def kv_by_layer(prefix: PrefixData, shapes: Sequence[LayerShape]) -> list[LayerKV]:
    """Keys and values ``[P, H, D]`` of a prefix by layer of the base model; without rows in layers it leaves out.

    The tensors are those of the prefix itself, which nobody may change.

    Args:
        prefix: Prefix.
        shapes: Heads of every layer of the base model.
    """
    kv = shared_tensors(prefix.kv)
    like = next(iter(kv.values()))
    empty = [like.new_empty(0, s.num_kv_heads, s.head_dim) for s in shapes]
    return [(kv.get(f"self.{i}.k", none), kv.get(f"self.{i}.v", none)) for i, none in enumerate(empty)]


def row_table(prefixes: Sequence[PrefixData], num_layers: int) -> PrefixRows:
    """Place of each prefix's rows in the tensors that `concat_kv` makes of the prefixes.

    Args:
        prefixes: Prefixes from left to right.
        num_layers: Number of layers of the base model.
    """
    return prefix_rows([(p.layers, p.length, p.pos_start, p.window == "slide") for p in prefixes], num_layers)


def concat_kv(
    prefixes: Sequence[PrefixData], shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device
) -> list[LayerKV]:
    """Keys and values of several prefixes, concatenated by layer; a prefix adds no rows to a layer it leaves out.

    Args:
        prefixes: Prefixes from left to right.
        shapes: Heads of every layer of the base model.
        dtype: dtype of the result.
        device: Device of the result.
    """
    none = [torch.empty(0, s.num_kv_heads, s.head_dim, dtype=dtype, device=device) for s in shapes]
    kvs = [kv_by_layer(p, shapes) for p in prefixes]

    def side(layer: int, j: int) -> Tensor:
        return torch.cat([none[layer], *(kv[layer][j].detach().to(device, dtype) for kv in kvs)])

    return [(side(i, 0), side(i, 1)) for i in range(len(shapes))]


def context(prefixes: Sequence[PrefixData], model: Model) -> tuple[list[LayerKV], PrefixRows]:
    """Keys and values of composed prefixes in the model's dtype, and the place of each prefix, for `text_kv`."""
    return concat_kv(prefixes, model.layers, model.dtype, model.device), row_table(prefixes, len(model.layers))
