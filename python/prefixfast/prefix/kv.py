"""Keys and values of whole prefixes as lists by layer, in the form that a packed forward takes.

Shape letters: P prefix rows, L layers, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prefixfast.attention.plan import FRONT, LayerKV, PlannedPrefix, PrefixRows, SitePrefixes, prefix_rows
from prefixfast.config.sites import Site
from prefixfast.model.base import Model
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.prefix_shape import by_source, filled_layers, own_layers, seeing_layers
from prefixfast.prefix.record import PrefixData
from prefixfast.prefix.tensors import shared_tensors


def kv_by_layer(prefix: PrefixData, shapes: Sequence[LayerShape], site: Site = "self") -> list[LayerKV]:
    """Keys and values ``[P, H, D]`` of a prefix by layer of a site; without rows in layers it leaves out.

    The tensors are those of the prefix itself, which nobody may change. A layer that reads the keys of another layer
    has the tensors of that layer.

    Args:
        prefix: Prefix.
        shapes: Heads of every layer of the site.
        site: Site.
    """
    kv, filled = shared_tensors(prefix.kv), filled_layers(prefix, shapes, site)
    own = no_rows(shapes, next(iter(kv.values())))
    for i in filled:
        s = shapes[i]
        k, v = kv[f"{site}.{i}.k"], kv[f"{site}.{i}.v"]
        if (k.shape[1:], v.shape[1:]) != s.row:  # the table of a PEFT adapter
            k, v = k[:, : s.num_kv_heads, : s.head_dim], v[:, : s.num_kv_heads, : s.value_dim]
        own[i] = k, v
    return by_source(shapes, own)


def no_rows(shapes: Sequence[LayerShape], like: Tensor) -> list[LayerKV]:
    """Keys and values of 0 rows by layer, in the dtype and on the device of ``like``."""
    return [(like.new_empty(0, *s.row[0]), like.new_empty(0, *s.row[1])) for s in shapes]


def row_table(prefixes: Sequence[PrefixData], model: Model, site: Site = "self") -> PrefixRows:
    """Place of each prefix's rows in the tensors that `concat_kv` makes of the prefixes.

    Args:
        prefixes: Prefixes from left to right.
        model: Base model.
        site: Site of the rows.
    """
    shapes = model.sites[site]
    seeing = [seeing_layers(shapes, filled_layers(p, shapes, site)) for p in prefixes]
    rows = [planned(p, layers, model, site) for p, layers in zip(prefixes, seeing, strict=True)]
    return prefix_rows(rows, len(shapes))


def planned(prefix: PrefixData, layers: Sequence[int], model: Model, site: Site = "self") -> PlannedPrefix:
    """The `PlannedPrefix` of a prefix at a site.

    Args:
        prefix: Prefix.
        layers: Layers of the site that attend to its rows.
        model: Base model.
        site: Site.
    """
    place = model.handle.infix.place if prefix.position == "infix" else FRONT
    return PlannedPrefix(layers, prefix.length_at(site), prefix.pos_start, prefix.window == "slide", place)


def concat_kv(
    prefixes: Sequence[PrefixData],
    shapes: Sequence[LayerShape],
    dtype: torch.dtype,
    device: torch.device,
    site: Site = "self",
) -> list[LayerKV]:
    """Keys and values of several prefixes, concatenated by layer; a prefix adds no rows to a layer it leaves out.

    Args:
        prefixes: Prefixes from left to right.
        shapes: Heads of every layer of the site.
        dtype: dtype of the result.
        device: Device of the result.
        site: Site.
    """
    none = no_rows(shapes, torch.empty(0, dtype=dtype, device=device))
    kvs = [kv_by_layer(p, shapes, site) for p in prefixes]

    def side(layer: int, j: int) -> Tensor:
        return torch.cat([none[layer][j], *(kv[layer][j].detach().to(device, dtype) for kv in kvs)])

    own = set(own_layers(shapes))
    return by_source(shapes, [(side(i, 0), side(i, 1)) if i in own else none[i] for i in range(len(shapes))])


def context(prefixes: Sequence[PrefixData], model: Model, site: Site = "self") -> tuple[list[LayerKV], PrefixRows]:
    """Keys and values of composed prefixes in the model's dtype, and the place of each prefix, for `text_kv`.

    Args:
        prefixes: Prefixes from left to right.
        model: Base model.
        site: Site.
    """
    kv = concat_kv(prefixes, model.sites[site], model.dtype, model.device, site)
    return kv, row_table(prefixes, model, site)


def site_prefixes(prefixes: Sequence[PrefixData], model: Model) -> Mapping[Site, SitePrefixes]:
    """Rows, keys and values of the prefixes of a batch at each site of the base model, for a plan without an arena.

    Args:
        prefixes: Prefixes in the order of their numbers in the batch. A prefix has 0 rows at a site that it leaves out.
        model: Base model.
    """
    found: dict[Site, SitePrefixes] = {}
    for site in model.sites:
        kv, rows = context(prefixes, model, site)
        found[site] = SitePrefixes(rows, kv if prefixes else None)
    return found
