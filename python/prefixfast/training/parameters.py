"""From parameters to keys and values: what training adjusts, for all prefixes of a run at once.

Shape letters: n prefixes of the run, P rows of each, L layers (of the base, or those that a prefix lies in), H kv heads, D head dim, E = H * D.
The forward always sees 2L leaf tensors ``[n * P, H, D]`` (rows of prefix i: i * P to (i + 1) * P; then the rows of a frozen prefix before all of them, if
there is one; a layer that a prefix leaves out has none of its rows): with reparameterization "none" they are the parameters themselves, else, or where rows
are dropped, frozen or added, they are made from the parameters once a step and `PrefixParameters.backward` carries their gradients on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefixfast.attention.plan import LayerKV
from prefixfast.config import PrefixConfig
from prefixfast.counter_rng import GOLDEN, mix
from prefixfast.errors import ConfigError
from prefixfast.model.attach import LayerShape


@dataclass
class PrefixParameters:
    """The trained parameters of n prefixes of equal length.

    Attributes:
        layers: Those that the prefixes lie in, ascending.
        num_prefixes: n.
        length: P.
        leaves: What the forward sees: per layer of the base keys and values ``[n * P, H, D]``, those of ``layers`` with ``requires_grad``.
        params: What the optimizer adjusts, each with its rows per prefix: the leaves (P rows), or the stacked networks (1 row).
        seeds: int64 ``[n]``: of each prefix's dropout.
        dropout: Share of keys and values dropped while training.
        mlp: The networks, None: flat.
        frozen: First rows that keep their values; of each prefix ``frozen_values`` holds P rows a tensor, of which these are used.
        frozen_values: See ``frozen``.
        base: Per layer of the base keys and values of a frozen prefix before all others, which follow the leaves' own rows; without one of 0 rows.
    """

    layers: tuple[int, ...]
    num_prefixes: int
    length: int
    leaves: list[LayerKV]
    params: list[tuple[Tensor, int]]
    seeds: Tensor
    dropout: float = 0.0
    mlp: _StackedMLP | None = None
    frozen: int = 0
    frozen_values: list[Tensor] = field(default_factory=list)
    base: list[LayerKV] = field(default_factory=list)
    _made: list[Tensor] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        shapes: tuple[LayerShape, ...],
        init: Sequence[list[LayerKV] | None],
        config: PrefixConfig,
        *,
        mlp: bool,
        seed: int | Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        on_top_of: Sequence[LayerKV] = (),
    ) -> PrefixParameters:
        """Parameters of ``len(init)`` prefixes.

        Args:
            shapes: Heads of every layer of the base.
            init: Of each prefix keys and values ``[P, H, D]`` by layer of the base, or None: random.
            config: Length, layers, MLP, dropout, frozen rows.
            mlp: Train the network that makes the prefix; with an init it starts as exactly that (the last layer is zero and the init is added), or,
                with ``config.fit_steps``, close to it.
            seed: Of each prefix, or one for all. Random numbers are drawn as by a lone prefix with this seed, so every prefix starts as it would alone.
            dtype: Of the parameters.
            device: Of the parameters.
            on_top_of: Keys and values ``[B, H, D]`` by layer of the base of a frozen prefix, whose rows follow those of the n prefixes in the leaves.

        Raises:
            ConfigError: If the MLP meets layers of different shapes.
        """
        n, p = len(init), config.length
        seeds = [seed] * n if isinstance(seed, int) else list(seed)
        layers = config.layers or tuple(range(len(shapes)))
        empty = [(torch.empty(0, s.num_kv_heads, s.head_dim),) * 2 for s in shapes]
        base = [(k.detach().to(device, dtype), v.detach().to(device, dtype)) for k, v in on_top_of or empty]
        shapes = tuple(shapes[i] for i in layers)
        own = {id(kv): kv and [kv[i] for i in layers] for kv in init}  # equal starts stay one object
        init = [own[id(kv)] for kv in init]
        drawn = {s: _random(shapes, p, s) for s in {s for s, kv in zip(seeds, init, strict=True) if kv is None}}
        filled = [kv or drawn[s] for s, kv in zip(seeds, init, strict=True)]
        start = [_stack(filled, layer, dtype, device) for layer in range(len(shapes))]
        common: dict[str, Any] = {
            "seeds": torch.tensor(seeds, device=device),
            "dropout": config.prefix_dropout,
            "base": base,
        }
        if not mlp:
            params = [(t.requires_grad_(), p) for kv in start for t in kv]
            made = cls(layers, n, p, [], params, **common)
        else:
            if len(set(shapes)) != 1:
                msg = "reparameterization 'mlp': expected layers of one shape, got several; use 'none'"
                raise ConfigError(msg)
            network = _StackedMLP(
                shapes, config, init, start if any(kv is not None for kv in init) else None, seeds, dtype, device
            )
            made = cls(layers, n, p, [], [(t, 1) for t in network.parameters()], mlp=network, **common)
        if config.frozen_rows:
            made.frozen_values = [t.clone() for t in made.current()]
            made.frozen = config.frozen_rows
        made.refresh(np.zeros(n, np.int64))
        return made

    @property
    def num_trained(self) -> int:
        """Numbers adjusted for one prefix."""
        every = sum(t.numel() for t, _ in self.params) // self.num_prefixes
        return every if self.mlp is not None else every * (self.length - self.frozen) // self.length

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Make the leaves of the coming step; gradients of an unfinished one are forgotten.

        Args:
            steps: int64 ``[n]``: each prefix's own step, which decides its dropout.
            dropout: False: the whole prefix, to evaluate it.
        """
        for t, _ in self.params:
            t.grad = None
        flat = self._flat()
        if self.dropout and dropout:
            flat = [t * keep for t, keep in zip(flat, self._keep(flat, steps), strict=True)]
        before = (t for i in self.layers for t in self.base[i])
        flat = [torch.cat([t, b]) if len(b) else t for t, b in zip(flat, before, strict=True)]
        self._made = [] if all(t is own for t, (own, _) in zip(flat, self.params, strict=False)) else flat
        own = _pairs([t.detach().requires_grad_() for t in flat] if self._made else flat)
        self.leaves = list(self.base)
        for layer, kv in zip(self.layers, own, strict=True):
            self.leaves[layer] = kv

    def backward(self) -> None:
        """Carry the leaves' gradients to the parameters; once a step, after the last micro-batch."""
        if self._made:
            own = (t for i in self.layers for t in self.leaves[i])
            pairs = [(made, leaf.grad) for made, leaf in zip(self._made, own, strict=True) if leaf.grad is not None]
            torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])
            self._made = []

    @torch.no_grad()
    def current(self) -> list[Tensor]:
        """All prefixes as they are now, without dropout: ``[n * P, H, D]`` a tensor, k0, v0, k1, ... of ``layers`` (views of flat parameters)."""
        return [t.detach() for t in self._flat()]

    def split(self, flat: list[Tensor], number: int) -> dict[str, Tensor]:
        """One prefix of what `current` gave, by tensor name, on the CPU."""
        rows = slice(number * self.length, (number + 1) * self.length)
        names = (f"self.{i}.{x}" for i in self.layers for x in "kv")
        return {name: t[rows].clone().cpu() for name, t in zip(names, flat, strict=True)}

    def _flat(self) -> list[Tensor]:
        flat = [t for t, _ in self.params] if self.mlp is None else self.mlp()
        if not self.frozen:
            return flat
        kept = (torch.arange(self.length, device=flat[0].device) < self.frozen).repeat(self.num_prefixes)[:, None, None]
        return [torch.where(kept, first, t) for first, t in zip(self.frozen_values, flat, strict=True)]

    def _keep(self, flat: list[Tensor], steps: np.ndarray) -> list[Tensor]:
        """Dropout factors, 0 or 1 / (1 - dropout), a hash of (seed, the prefix's step, tensor, row, element): the same whoever else is trained."""
        step = (torch.from_numpy(steps).to(flat[0].device) + self.seeds * GOLDEN)[:, None, None]
        row = torch.arange(self.length, device=flat[0].device)[None, :, None]
        keep = []
        for i, t in enumerate(flat):
            element = torch.arange(t[0].numel(), device=t.device)[None, None]
            bits = mix(mix(mix(mix(step) + i) + row) + element)
            uniform = (bits >> 9).to(t.dtype) / 2**23
            factor = (uniform >= self.dropout).to(t.dtype) / (1 - self.dropout)
            keep.append(torch.where(row < self.frozen, 1.0, factor).view(t.shape))
        return keep


class _StackedMLP(nn.Module):
    """n reparameterization networks side by side: embedding ``[P, E]``, linear to ``hidden``, tanh, linear to ``2 * L * E`` (Li & Liang 2021, section 4.3)."""

    def __init__(
        self,
        shapes: tuple[LayerShape, ...],
        config: PrefixConfig,
        init: Sequence[list[LayerKV] | None],
        start: list[LayerKV] | None,
        seeds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.shape = shapes[0]
        drawn = {
            s: _draw_mlp(len(shapes), self.shape.num_kv_heads * self.shape.head_dim, config, s) for s in set(seeds)
        }
        self.embedding, self.w1, self.b1, self.w2, self.b2 = (
            nn.Parameter(torch.stack([drawn[s][i] for s in seeds]).to(device, dtype)) for i in range(5)
        )
        self.start = start
        self.given = torch.tensor([kv is not None for kv in init], device=device)
        if start is not None and config.fit_steps:
            self._fit(start, [(s, id(kv)) for s, kv in zip(seeds, init, strict=True)], config.fit_steps)
            self.start = None
        elif start is not None:
            with torch.no_grad():
                self.w2[self.given] = 0
                self.b2[self.given] = 0

    def forward(self) -> list[Tensor]:
        """Per layer keys and values ``[n * P, H, D]``, flattened to one list k0, v0, k1, ..."""
        layers = self._unbind(_run_mlp(self.embedding, self.w1, self.b1, self.w2, self.b2))
        if self.start is None:
            return list(layers)
        given = self.given.repeat_interleave(self.embedding.shape[1])[:, None, None]
        return [
            made + torch.where(given, base, 0)
            for made, base in zip(layers, (t for kv in self.start for t in kv), strict=True)
        ]

    def _unbind(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.flatten(0, 1).unflatten(1, (-1, self.shape.num_kv_heads, self.shape.head_dim)).unbind(1)

    def _fit(self, start: list[LayerKV], kinds: list[tuple[int, int]], steps: int) -> None:
        """Adam on the squared distance to the given keys and values (Li & Liang's low-data start); equal starts are fitted once.

        Source:
            Their ``lowdata_init_train3``: 500 steps at 1e-4 on the linear layers, not on the embedding.
        """
        first = {kind: i for i, kind in reversed(list(enumerate(kinds))) if bool(self.given[i])}
        numbers = torch.tensor(list(first.values()), device=self.given.device)
        p = self.embedding.shape[1]
        goal = torch.stack([t.unflatten(0, (-1, p))[numbers] for kv in start for t in kv], 2).flatten(
            2
        )  # [unique, P, 2 * L * E]
        with torch.enable_grad():
            linear = [t.detach()[numbers].requires_grad_() for t in (self.w1, self.b1, self.w2, self.b2)]
            optimizer = torch.optim.Adam(linear, lr=1e-4)
            for _ in range(steps):
                optimizer.zero_grad()
                (_run_mlp(self.embedding.detach()[numbers], *linear) - goal).square().mean((1, 2)).sum().backward()
                optimizer.step()
        place = {kind: i for i, kind in enumerate(first)}
        with torch.no_grad():
            where = torch.tensor([place[k] for k in kinds if k in place], device=self.given.device)
            for own, fitted in zip((self.w1, self.b1, self.w2, self.b2), linear, strict=True):
                own[self.given] = fitted.detach()[where]


def _draw_mlp(layers: int, width: int, config: PrefixConfig, seed: int) -> tuple[Tensor, ...]:
    """Weights of one network, in the order in which PEFT draws them: a run with its seed starts at its weights."""
    dim, hidden = config.embedding_dim or width, config.encoder_hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding, first, second = (
            nn.Embedding(config.length, dim),
            nn.Linear(dim, hidden),
            nn.Linear(hidden, 2 * layers * width),
        )
    return tuple(t.detach() for t in (embedding.weight, first.weight.T, first.bias, second.weight.T, second.bias))


def _run_mlp(embedding: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``[n, P, 2 * L * E]``."""
    return torch.baddbmm(b2[:, None], torch.tanh(torch.baddbmm(b1[:, None], embedding, w1)), w2)


def _pairs(flat: list[Tensor]) -> list[LayerKV]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _stack(init: list[list[LayerKV]], layer: int, dtype: torch.dtype, device: torch.device) -> LayerKV:
    keys, values = (torch.cat([kv[layer][j].detach().to(device, dtype) for kv in init]) for j in (0, 1))
    return keys, values


def _random(shapes: tuple[LayerShape, ...], length: int, seed: int) -> list[LayerKV]:
    """Standard normal numbers, as PEFT starts a flat prefix (Embedding's initialization), one generator a prefix."""
    generator = torch.Generator().manual_seed(seed)

    def draw(s: LayerShape) -> Tensor:
        return torch.randn(length, s.num_kv_heads, s.head_dim, generator=generator)

    return [(draw(s), draw(s)) for s in shapes]
