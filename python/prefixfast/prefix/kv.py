"""Keys and values of whole prefixes as lists by layer, in the form that a packed forward takes.

Shape letters: P prefix rows, L layers, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefixfast.attention.plan import FRONT, LayerKV, PlannedPrefix, PrefixRows, prefix_rows
from prefixfast.model.base import Model
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.prefix_shape import by_source, filled_layers, own_layers, seeing_layers
from prefixfast.prefix.record import PrefixData
from prefixfast.prefix.tensors import shared_tensors


def kv_by_layer(prefix: PrefixData, shapes: Sequence[LayerShape]) -> list[LayerKV]:
    """Keys and values ``[P, H, D]`` of a prefix by layer of the base model; without rows in layers it leaves out.

    The tensors are those of the prefix itself, which nobody may change. A layer that reads the keys of another layer
    has the tensors of that layer.

    Args:
        prefix: Prefix.
        shapes: Heads of every layer of the base model.
    """
    kv, filled = shared_tensors(prefix.kv), filled_layers(prefix, shapes)
    own = no_rows(shapes, next(iter(kv.values())))
    for i in filled:
        s = shapes[i]
        k, v = kv[f"self.{i}.k"], kv[f"self.{i}.v"]
        if (k.shape[1:], v.shape[1:]) != s.row:  # the table of a PEFT adapter
            k, v = k[:, : s.num_kv_heads, : s.head_dim], v[:, : s.num_kv_heads, : s.value_dim]
        own[i] = k, v
    return by_source(shapes, own)


def no_rows(shapes: Sequence[LayerShape], like: Tensor) -> list[LayerKV]:
    """Keys and values of 0 rows by layer, in the dtype and on the device of ``like``."""
    return [(like.new_empty(0, *s.row[0]), like.new_empty(0, *s.row[1])) for s in shapes]


def row_table(prefixes: Sequence[PrefixData], model: Model) -> PrefixRows:
    """Place of each prefix's rows in the tensors that `concat_kv` makes of the prefixes.

    Args:
        prefixes: Prefixes from left to right.
        model: Base model.
    """
    shapes = model.layers
    return prefix_rows(
        [planned(p, seeing_layers(shapes, filled_layers(p, shapes)), model) for p in prefixes], len(shapes)
    )


def planned(prefix: PrefixData, layers: Sequence[int], model: Model) -> PlannedPrefix:
    """The `PlannedPrefix` of a prefix.

    Args:
        prefix: Prefix.
        layers: Layers that attend to its rows.
        model: Base model.
    """
    place = model.handle.infix.place if prefix.position == "infix" else FRONT
    return PlannedPrefix(layers, prefix.length, prefix.pos_start, prefix.window == "slide", place)


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
    none = no_rows(shapes, torch.empty(0, dtype=dtype, device=device))
    kvs = [kv_by_layer(p, shapes) for p in prefixes]

    def side(layer: int, j: int) -> Tensor:
        return torch.cat([none[layer][j], *(kv[layer][j].detach().to(device, dtype) for kv in kvs)])

    own = set(own_layers(shapes))
    return by_source(shapes, [(side(i, 0), side(i, 1)) if i in own else none[i] for i in range(len(shapes))])


def context(prefixes: Sequence[PrefixData], model: Model) -> tuple[list[LayerKV], PrefixRows]:
    """Keys and values of composed prefixes in the model's dtype, and the place of each prefix, for `text_kv`."""
    return concat_kv(prefixes, model.layers, model.dtype, model.device), row_table(prefixes, model)
