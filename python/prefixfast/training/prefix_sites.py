"""The trained parameters of all prefixes of a run, at every site of the base model that gets a prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from prefixfast.attention.plan import LayerKV
from prefixfast.config.sites import SITES, BySite, Site


class SiteParameters(Protocol):
    """The trained parameters of n prefixes of equal length at one site.

    Attributes:
        layers: Layers in which the prefixes lie, ascending.
        length: Number of rows P of a prefix.
        leaves: Keys and values ``[rows, H, D]`` by layer of the base model that the forward pass reads.
        params: Tensors that the optimizer updates, each with its number of rows per prefix.
    """

    layers: tuple[int, ...]
    length: int
    leaves: list[LayerKV]
    params: list[tuple[Tensor, int]]

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the leaves of the next forward pass, and discard gradients of an unfinished step."""

    def backward(self) -> None:
        """Carry the gradients of the leaves to the parameters, once a step after the last micro-batch."""

    def current(self) -> list[Tensor]:
        """Current keys and values ``[n * P, H, D]`` of ``layers``, in the order k0, v0, k1, ..."""

    def split(self, flat: Sequence[Tensor], number: int) -> dict[str, Tensor]:
        """Keys and values of one prefix by name, from those of `current`."""


class TrainedPrefixes:
    """The trained parameters of n prefixes at several sites.

    A prefix has one gradient norm, one learning rate and one update over all of its sites.

    Args:
        by_site: Parameters by site, at least one.

    Attributes:
        by_site: Parameters by site, in the order of `SITES`.
        params: Tensors of all sites that the optimizer updates, each with its number of rows per prefix.
    """

    def __init__(self, by_site: Mapping[Site, SiteParameters]) -> None:
        self.by_site = {site: by_site[site] for site in SITES if site in by_site}
        self.params = [pair for own in self.by_site.values() for pair in own.params]

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""
        return sum(own.num_trained for own in self.by_site.values())

    @property
    def lengths(self) -> BySite[int]:
        """Number of rows of a prefix at each site."""
        return BySite({site: own.length for site, own in self.by_site.items()})

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the leaves of the next forward pass, and discard gradients of an unfinished step.

        Args:
            steps: Number of the step of each prefix, int64 ``[n]``, which decides its dropout.
            dropout: Whether dropout is applied; evaluation turns it off.
        """
        for own in self.by_site.values():
            own.refresh(steps, dropout=dropout)

    def backward(self) -> None:
        """Carry the gradients of the leaves to the parameters, once a step after the last micro-batch."""
        for own in self.by_site.values():
            own.backward()

    def current(self) -> list[Tensor]:
        """Current keys and values of all prefixes, those of each site after each other."""
        return [t for own in self.by_site.values() for t in own.current()]

    def split(self, flat: Sequence[Tensor], number: int) -> dict[str, Tensor]:
        """Tensors of one prefix by name, on the CPU; they can be views of ``flat``.

        Args:
            flat: Tensors as `current` gives them.
            number: Number of the prefix.
        """
        found: dict[str, Tensor] = {}
        start = 0
        for own in self.by_site.values():
            end = start + 2 * len(own.layers)
            found |= own.split(flat[start:end], number)
            start = end
        return found
