"""The trained parameters of the prefixes of a run, at every site of the base model that gets a prefix.

Prefixes of which the same is learned form a block, whose parameters lie in the same tensors. Blocks can have other
sites, layers and numbers of rows. `SiteLeaves` puts their keys and values after each other for the forward pass.

Shape letters: m prefixes of a block, P rows of a prefix, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import LayerKV
from prefixfast.config.sites import SITES, Site


class SiteParameters(Protocol):
    """The trained parameters of m prefixes of equal length at one site.

    Attributes:
        layers: Layers in which the prefixes lie, ascending.
        length: Number of rows P of a prefix.
        leaves: Keys and values ``[rows, H, D]`` by layer of the base model that the forward pass reads.
        params: Tensors that the optimizer updates, each with equally many rows of every prefix.
    """

    layers: tuple[int, ...]
    length: int
    leaves: list[LayerKV]
    params: list[Tensor]

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the leaves of the next forward pass, and discard gradients of an unfinished step."""

    def backward(self) -> None:
        """Carry the gradients of the leaves to the parameters, once a step after the last micro-batch."""

    def current(self) -> list[Tensor]:
        """Current keys and values ``[m * P, H, D]`` of ``layers``, in the order k0, v0, k1, ..."""

    def split(self, flat: Sequence[Tensor], number: int) -> dict[str, Tensor]:
        """Keys and values of one prefix by name, from those of `current`."""


class TrainedPrefixes:
    """The trained parameters of a block of m prefixes at several sites.

    A prefix has one gradient norm, one learning rate and one update over all of its sites.

    Args:
        numbers: Numbers of the prefixes in their group, ascending.
        by_site: Parameters by site, at least one.

    Attributes:
        numbers: Numbers of the prefixes in their group, int64 ``[m]``.
        by_site: Parameters by site, in the order of `SITES`.
        params: Tensors of all sites that the optimizer updates.
    """

    def __init__(self, numbers: Sequence[int], by_site: Mapping[Site, SiteParameters]) -> None:
        self.numbers = np.array(numbers, np.int64)
        self.by_site = {site: by_site[site] for site in SITES if site in by_site}
        self.params = [t for own in self.by_site.values() for t in own.params]

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""
        return sum(own.num_trained for own in self.by_site.values())

    def length_at(self, site: Site) -> int:
        """Number of rows of a prefix at a site, 0 at a site without rows."""
        return self.by_site[site].length if site in self.by_site else 0

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the leaves of the next forward pass, and discard gradients of an unfinished step.

        Args:
            steps: Number of the step of each prefix of the group, int64 ``[n]``, which decides its dropout.
            dropout: Whether dropout is applied; evaluation turns it off.
        """
        for own in self.by_site.values():
            own.refresh(steps[self.numbers], dropout=dropout)

    def backward(self) -> None:
        """Carry the gradients of the leaves to the parameters, once a step after the last micro-batch."""
        for own in self.by_site.values():
            own.backward()

    def current(self) -> list[Tensor]:
        """Current keys and values of the block's prefixes, those of each site after each other."""
        return [t for own in self.by_site.values() for t in own.current()]

    def split(self, flat: Sequence[Tensor], number: int) -> dict[str, Tensor]:
        """Tensors of one prefix by name, on the CPU; they can be views of ``flat``.

        Args:
            flat: Tensors as `current` gives them.
            number: Number of the prefix in the block.
        """
        found: dict[str, Tensor] = {}
        start = 0
        for own in self.by_site.values():
            end = start + 2 * len(own.layers)
            found |= own.split(flat[start:end], number)
            start = end
        return found


class SiteLeaves:
    """The keys and values of several blocks of prefixes at one site, after each other in the tensor of each layer.

    Args:
        blocks: Parameters of each block that has rows at the site.
        frozen: Keys and values ``[rows, H, D]`` by layer of the base model of a frozen prefix, which come last; 0 rows
            without one.
        source: Layer whose keys and values each layer of the base model reads.

    Attributes:
        leaves: Keys and values ``[rows, H, D]`` by layer of the base model that the forward pass reads. Those of layers
            with trained rows have ``requires_grad``.
    """

    def __init__(self, blocks: Sequence[SiteParameters], frozen: Sequence[LayerKV], source: Sequence[int]) -> None:
        self.blocks, self.frozen, self.source = list(blocks), list(frozen), list(source)
        self.layers = sorted({i for own in self.blocks for i in own.layers})
        self.leaves: list[LayerKV] = list(self.frozen)

    def refresh(self) -> None:
        """Join the current leaves of the blocks."""
        joined = list(self.frozen)
        for layer in self.layers:
            keys, values = (
                torch.cat([own.leaves[layer][x].detach() for own in self._at(layer)] + [self.frozen[layer][x]])
                for x in (0, 1)
            )
            joined[layer] = keys.requires_grad_(), values.requires_grad_()
        self.leaves = [joined[source] for source in self.source]

    def backward(self) -> None:
        """Carry the gradients to the leaves of the blocks, once a step after the last micro-batch."""
        for layer in self.layers:
            for x, joined in enumerate(self.leaves[layer]):
                end = 0
                for own in self._at(layer):
                    leaf = own.leaves[layer][x]
                    start, end = end, end + len(leaf)
                    leaf.grad = None if joined.grad is None else joined.grad[start:end]

    def _at(self, layer: int) -> list[SiteParameters]:
        return [own for own in self.blocks if layer in own.layers]


class _TakeRows(torch.autograd.Function):
    """Rows of a leaf, whose gradient goes into those rows of the leaf's gradient alone.

    The backward of torch's indexing makes a gradient of all rows for each micro-batch, so that the time of a step grows
    with the square of the number of prefixes.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, places: Tensor) -> Tensor:
        ctx.leaf, ctx.places = leaf, places
        return leaf.detach().index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        leaf = ctx.leaf
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        leaf.grad[ctx.places] += grads[0]
        return None, None


def take_rows(leaves: Sequence[LayerKV], places: Sequence[Tensor]) -> list[LayerKV]:
    """Some rows of the keys and values of each layer, differentiable once by a backward.

    Args:
        leaves: Keys and values ``[rows, H, D]`` by layer of the base model. Layers may share them.
        places: Different rows of each layer, int64.
    """
    taken: dict[int, Tensor] = {}
    made = []
    for kv, at in zip(leaves, places, strict=True):
        for t in kv:
            if id(t) not in taken:
                taken[id(t)] = _TakeRows.apply(t, at) if t.requires_grad else t.index_select(0, at)
        made.append((taken[id(kv[0])], taken[id(kv[1])]))
    return made
