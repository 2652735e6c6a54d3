"""`ArenaSites`, the place of a prefix's rows in the KV arena.

A prefix is one run of arena rows: those of the decoder's self-attention, of cross-attention and of the encoder, each
part beginning at a multiple of 16 rows. The arena has the layers of the decoder. Encoder layer i lies in the tensors of
decoder layer i modulo the number of decoder layers. An encoder with more layers than the decoder has its further layers
behind the first ones in the same tensors, one fold of rows after the other.

Shape letters: P prefix rows of a site, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast.attention.plan import Arena, LayerKV
from prefixfast.config.sites import Site
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.prefix_shape import PrefixShape, filled_layers, own_layers, seeing_layers
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.prefix.record import PrefixData

ROW_UNIT = 16  # the scheduler hands out arena rows in units of this size
PARTS: tuple[Site, ...] = ("self", "cross", "enc")  # order of the sites in a run


class SiteRows(NamedTuple):
    """Rows of a prefix at one site.

    Attributes:
        offset: First row in the prefix's run.
        rows: Number P of rows in a layer.
        layers: Whether each layer of the site sees the rows, None if all do.
    """

    offset: int
    rows: int
    layers: list[bool] | None


class PrefixRun(NamedTuple):
    """Run of arena rows of a prefix.

    Attributes:
        rows: Number of rows.
        sites: Rows of each site of the base model, in the order of `PARTS`.
    """

    rows: int
    sites: Mapping[Site, SiteRows]


class _Lane(NamedTuple):
    """A layer of a site with keys of its own, the arena tensors in which its rows lie, and its fold."""

    site: Site
    layer: int
    kv: LayerKV
    fold: int


def prefix_run(prefix: PrefixShape, sites: Mapping[Site, Sequence[LayerShape]]) -> PrefixRun:
    """Run of arena rows that a prefix takes.

    Args:
        prefix: Prefix, or its entry in a store.
        sites: Heads of each layer of each site of the base model.
    """
    end, found, depth = 0, dict[Site, SiteRows](), len(sites["self"])
    for site in PARTS:
        if (shapes := sites.get(site)) is not None:
            rows = prefix.length_at(site)
            start = -(-end // ROW_UNIT) * ROW_UNIT if rows else 0
            seeing = seeing_layers(shapes, filled_layers(prefix, shapes, site))
            layers = None if len(seeing) == len(shapes) else [i in seeing for i in range(len(shapes))]
            found[site] = SiteRows(start, rows, layers)
            folds = -(-len(shapes) // depth)
            end = start + folds * rows if rows else end
    return PrefixRun(end, found)


class ArenaSites:
    """Places of prefixes in the KV arena of an engine.

    Args:
        arena: Arena.
        sites: Heads of each layer of each site of the base model.
    """

    def __init__(self, arena: Arena, sites: Mapping[Site, Sequence[LayerShape]]) -> None:
        self.sites, depth = sites, len(arena.layers)
        self.parts = [site for site in PARTS if site in sites]
        tensors = {site: arena.encoder_layers if site == "enc" else arena.layers for site in self.parts}
        self.lanes = [
            _Lane(site, i, tensors[site][i], i // depth) for site in self.parts for i in own_layers(sites[site])
        ]
        self.layers = [lane.kv for lane in self.lanes if lane.site == "self"]  # keys and values of the arena

    def release(self) -> None:
        """Drop the tensors of the arena."""
        self.layers, self.lanes = [], []

    @property
    def device(self) -> torch.device:
        """Device of the arena."""
        return self.layers[0][0].device

    def run(self, prefix: PrefixShape) -> PrefixRun:
        """Run of arena rows that a prefix takes.

        Args:
            prefix: Prefix, or its entry in a store.
        """
        return prefix_run(prefix, self.sites)

    def kv(self, prefix: PrefixData) -> list[LayerKV]:
        """Keys and values of a prefix for each lane; without rows in layers that it leaves out.

        Args:
            prefix: Prefix.
        """
        kvs = {site: kv_by_layer(prefix, self.sites[site], site) for site in self.parts}
        return [kvs[lane.site][lane.layer] for lane in self.lanes]

    def targets(self, run: PrefixRun, first_row: int, kv: Sequence[LayerKV]) -> Iterator[tuple[Tensor, Tensor]]:
        """Arena rows of a prefix, and the tensors to copy into them.

        Args:
            run: Run of the prefix.
            first_row: First arena row of the run.
            kv: Keys and values of the prefix for each lane.

        Yields:
            Rows ``[P, H, D]`` of the arena, and the prefix's keys or values, whose D can be smaller.
        """
        for (site, _, tensors, fold), source in zip(self.lanes, kv, strict=True):
            rows = run.sites[site]
            start = first_row + rows.offset + fold * rows.rows
            for arena, x in zip(tensors, source, strict=True):
                yield arena[start : start + len(x)], x

    def clear(self, first_row: int, count: int) -> None:
        """Set arena rows of all layers to zero.

        Args:
            first_row: First row.
            count: Number of rows.
        """
        for t in (t for kv in self.layers for t in kv):
            t[first_row : first_row + count].zero_()
