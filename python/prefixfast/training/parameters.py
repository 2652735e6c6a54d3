"""The trained parameters of all prefixes of a run at one site, and the keys and values that the forward pass reads.

The forward pass reads 2L leaf tensors ``[rows, H, D]``, the keys and values of each layer. They hold the rows of prefix
i at ``i * P`` to ``(i + 1) * P``, and after them the rows of a frozen prefix, if there is one. A layer that a prefix
leaves out has none of the prefix's rows.

With reparameterization "none", and without dropout, frozen rows or a frozen prefix, the leaves are the parameters
themselves. Otherwise the leaves are computed from the parameters once a step, and `PrefixParameters.backward` carries
their gradients to the parameters.

Shape letters: n prefixes, P rows of a prefix, L layers, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import LayerKV
from prefixfast.config import PrefixConfig
from prefixfast.config.sites import SITES, Site
from prefixfast.counter_rng import GOLDEN, mix
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.prefix_shape import own_layers, source_of
from prefixfast.prefix.kv import no_rows
from prefixfast.training.mlp import StackedMLP


@dataclass(frozen=True)
class ParameterOptions:
    """Options of the parameters of a group of prefixes.

    Attributes:
        config: Options of what is learned: length and layers of each site, MLP, dropout, frozen rows.
        uses_mlp: Whether the reparameterization MLP is trained instead of the keys and values. With initial values the
            network starts as exactly these, or close to them with ``config.fit_steps``.
        seeds: Random seed of each prefix, or one for all. Random numbers are drawn as for a single prefix with the
            seed, so that a prefix starts with the same values alone and among others. Each site has numbers of its own.
        dtype: dtype of the parameters.
        device: Device of the parameters.
    """

    config: PrefixConfig
    uses_mlp: bool
    seeds: int | Sequence[int]
    dtype: torch.dtype
    device: torch.device


@dataclass
class PrefixParameters:
    """The trained parameters of n prefixes of equal length at one site.

    Attributes:
        site: Kind of attention that sees the prefixes.
        layers: Layers in which the prefixes lie, ascending.
        num_prefixes: Number of prefixes n.
        length: Number of rows P of a prefix.
        source: Layer whose keys and values each layer of the base model reads.
        leaves: Keys and values ``[rows, H, D]`` by layer of the base model that the forward pass reads; those of
            ``layers``, and of the layers that read their keys, have ``requires_grad``.
        params: Tensors that the optimizer updates, with P rows per prefix for keys and values and 1 for
            stacked networks.
        seeds: Random seed of the dropout of each prefix, int64 ``[n]``.
        dropout: Share of keys and values that is dropped in training.
        mlp: Reparameterization networks, None if keys and values are trained themselves.
        num_frozen: Number of leading rows of each prefix that keep their values.
        frozen_values: Initial values of all rows, of which the frozen ones are used; empty without frozen rows.
        frozen_prefix: Keys and values ``[rows, H, D]`` by layer of the base model of a frozen prefix before the trained
            ones; 0 rows without one.
    """

    site: Site
    layers: tuple[int, ...]
    num_prefixes: int
    length: int
    source: list[int]
    leaves: list[LayerKV]
    params: list[Tensor]
    seeds: Tensor
    dropout: float = 0.0
    mlp: StackedMLP | None = None
    num_frozen: int = 0
    frozen_values: list[Tensor] = field(default_factory=list)
    frozen_prefix: list[LayerKV] = field(default_factory=list)
    _computed: list[Tensor] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        shapes: tuple[LayerShape, ...],
        init: Sequence[list[LayerKV] | None],
        options: ParameterOptions,
        *,
        on_top_of: Sequence[LayerKV] = (),
        site: Site = "self",
    ) -> PrefixParameters:
        """Make the parameters of ``len(init)`` prefixes.

        Args:
            shapes: Heads of every layer of the site in the base model.
            init: Initial keys and values ``[P, H, D]`` by layer of the base model of each prefix, None for random ones.
            options: Options of the parameters.
            on_top_of: Keys and values ``[rows, H, D]`` by layer of the base model of a frozen prefix.
            site: Kind of attention that sees the prefixes.
        """
        config, dtype, device = options.config, options.dtype, options.device
        n, p = len(init), config.length_at(site)
        seeds = [options.seeds] * n if isinstance(options.seeds, int) else list(options.seeds)
        seeds = [_site_seed(seed, site) for seed in seeds]
        layers, source = config.layers_at(site) or own_layers(shapes), source_of(shapes)
        empty = no_rows(shapes, torch.empty(0))
        frozen_prefix = [(k.detach().to(device, dtype), v.detach().to(device, dtype)) for k, v in on_top_of or empty]
        shapes = tuple(shapes[i] for i in layers)
        of_layers = {id(kv): kv and [kv[i] for i in layers] for kv in init}  # equal initial values stay one object
        init = [of_layers[id(kv)] for kv in init]
        drawn = {s: _random_kv(shapes, p, s) for s in {s for s, kv in zip(seeds, init, strict=True) if kv is None}}
        filled = [kv or drawn[s] for s, kv in zip(seeds, init, strict=True)]
        start = [_concat_layer(filled, layer, dtype, device) for layer in range(len(shapes))]
        common: dict[str, Any] = {
            "seeds": torch.tensor(seeds, device=device),
            "dropout": config.prefix_dropout,
            "frozen_prefix": frozen_prefix,
        }
        if not options.uses_mlp:
            params = [t.requires_grad_() for kv in start for t in kv]
            made = cls(site, layers, n, p, source, [], params, **common)
        else:
            network = StackedMLP(init, start, config, seeds)
            made = cls(site, layers, n, p, source, [], [*network.parameters()], mlp=network, **common)
        if config.frozen_rows:
            made.frozen_values = [t.clone() for t in made.current()]
            made.num_frozen = config.frozen_rows
        made.refresh(np.zeros(n, np.int64))
        return made

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""
        every = sum(t.numel() for t in self.params) // self.num_prefixes
        return every if self.mlp is not None else every * (self.length - self.num_frozen) // self.length

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the leaves of the next forward pass, and discard gradients of an unfinished step.

        Args:
            steps: Number of the step of each prefix, int64 ``[n]``, which decides its dropout.
            dropout: Whether dropout is applied; evaluation turns it off.
        """
        for t in self.params:
            t.grad = None
        flat = self._flat()
        if self.dropout and dropout:
            flat = [t * factor for t, factor in zip(flat, self._dropout_factors(flat, steps), strict=True)]
        frozen = (t for i in self.layers for t in self.frozen_prefix[i])
        flat = [torch.cat([t, b]) if len(b) else t for t, b in zip(flat, frozen, strict=True)]
        self._computed = [] if all(t is own for t, own in zip(flat, self.params, strict=False)) else flat
        leaves = [t.detach().requires_grad_() for t in flat] if self._computed else flat
        self.leaves = list(self.frozen_prefix)
        for layer, kv in zip(self.layers, zip(leaves[::2], leaves[1::2], strict=True), strict=True):
            self.leaves[layer] = kv
        self.leaves = [self.leaves[source] for source in self.source]

    def backward(self) -> None:
        """Carry the gradients of the leaves to the parameters, once a step after the last micro-batch."""
        if self._computed:
            leaves = (t for i in self.layers for t in self.leaves[i])
            pairs = [
                (out, leaf.grad) for out, leaf in zip(self._computed, leaves, strict=True) if leaf.grad is not None
            ]
            torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
            self._computed = []

    @torch.no_grad()
    def current(self) -> list[Tensor]:
        """Current keys and values of all prefixes, without dropout.

        Returns:
            Tensors ``[n * P, H, D]`` of ``layers``, in the order k0, v0, k1, ... Without an MLP they are views of the
            parameters.
        """
        return [t.detach() for t in self._flat()]

    def split(self, flat: Sequence[Tensor], number: int) -> dict[str, Tensor]:
        """Tensors of one prefix by name, on the CPU; they can be views of ``flat``.

        Args:
            flat: Tensors as `current` gives them.
            number: Number of the prefix.
        """
        return split_rows(self.layers, flat, self.length, number, self.site)

    def _flat(self) -> list[Tensor]:
        flat = self.params if self.mlp is None else self.mlp()
        if not self.num_frozen:
            return flat
        is_frozen = torch.arange(self.length, device=flat[0].device) < self.num_frozen
        is_frozen = is_frozen.repeat(self.num_prefixes)[:, None, None]
        return [torch.where(is_frozen, first, t) for first, t in zip(self.frozen_values, flat, strict=True)]

    def _dropout_factors(self, flat: list[Tensor], steps: np.ndarray) -> list[Tensor]:
        """Factors 0 or ``1 / (1 - dropout)``, 1 for frozen rows.

        The random numbers are a hash of the prefix's seed and step, the tensor, the row and the element, so that they
        do not depend on the other prefixes of the run.
        """
        step = (torch.from_numpy(steps).to(flat[0].device) + self.seeds * GOLDEN)[:, None, None]
        row = torch.arange(self.length, device=flat[0].device)[None, :, None]
        factors = []
        for i, t in enumerate(flat):
            element = torch.arange(t[0].numel(), device=t.device)[None, None]
            bits = mix(mix(mix(mix(step) + i) + row) + element)
            uniform = (bits >> 9).to(t.dtype) / 2**23
            factor = (uniform >= self.dropout).to(t.dtype) / (1 - self.dropout)
            factors.append(torch.where(row < self.num_frozen, 1.0, factor).view(t.shape))
        return factors


def split_rows(
    layers: Sequence[int], flat: Sequence[Tensor], length: int, number: int, site: Site = "self"
) -> dict[str, Tensor]:
    """Keys and values of one prefix by name, on the CPU.

    Args:
        layers: Layers of the tensors, ascending.
        flat: Keys and values ``[n * P, H, D]`` of all prefixes, in the order k0, v0, k1, ...
        length: Number of rows P of a prefix.
        number: Number of the prefix.
        site: Kind of attention that sees the prefixes.
    """
    rows = slice(number * length, (number + 1) * length)
    names = (f"{site}.{i}.{x}" for i in layers for x in "kv")
    return {name: t[rows].cpu() for name, t in zip(names, flat, strict=True)}


def _site_seed(seed: int, site: Site) -> int:
    """Seed of the random numbers of a site. That of the decoder's self-attention is the seed itself."""
    if site == "self":
        return seed
    return int(np.random.SeedSequence([seed, SITES.index(site)]).generate_state(1, np.uint64)[0] >> 2)


def _concat_layer(init: list[list[LayerKV]], layer: int, dtype: torch.dtype, device: torch.device) -> LayerKV:
    keys, values = (torch.cat([kv[layer][j].detach().to(device, dtype) for kv in init]) for j in (0, 1))
    return keys, values


def _random_kv(shapes: tuple[LayerShape, ...], length: int, seed: int) -> list[LayerKV]:
    """Standard normal keys and values of one prefix, the distribution of PEFT's initialization."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(length, heads, dim, generator=generator)

    return [(draw(s.num_kv_heads, s.head_dim), draw(s.num_kv_heads, s.value_dim)) for s in shapes]
