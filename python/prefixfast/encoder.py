"""From parameters to keys and values: what training adjusts, for all prefixes of a run at once.

Shape letters: n prefixes of the run, P rows of each, L layers, H kv heads, D head dim, E = H * D.
The forward always sees 2L leaf tensors ``[n * P, H, D]`` (rows of prefix i: i * P to (i + 1) * P): with reparameterization "none" they are the parameters
themselves, else they are made from the parameters once a step and `PrefixParameters.backward` carries their gradients on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from prefixfast.attach import LayerShape
from prefixfast.config import PrefixConfig
from prefixfast.errors import ConfigError
from prefixfast.model import Model
from prefixfast.noise import GOLDEN, mix
from prefixfast.plan import Arena, LayerKV, training_plan

if TYPE_CHECKING:
    from prefixfast.prefix import Prefix


@torch.no_grad()
def text_kv(model: Model, ids: Sequence[int], length: int, *, after: Sequence[Prefix] = ()) -> list[LayerKV]:
    """Keys and values of a text in the base itself, fp32 ``[P, H, D]`` a layer; a short text is repeated, a long one cut to its first P tokens.

    Args:
        model: The base.
        ids: The text's tokens, at least one.
        length: P.
        after: Prefixes before the text, left to right.
    """
    tokens = torch.tensor((list(ids) * length)[:length], device=model.device)
    starts = np.cumsum([0, *(p.length for p in after)])
    before, number = int(starts[-1]), np.arange(len(after), dtype=np.int32)
    rows = np.array([[s, p.length, p.pos_start, p.window == "slide"] for s, p in zip(starts, after, strict=False)], np.int32).reshape(-1, 4)
    indptr = np.array([0, len(after)], np.int32)
    plan = training_plan(np.array([length], np.int32), indptr, number, rows, None, backend=model.backend, device=model.device)
    kinds = [(f"self.{i}.{x}", s) for i, s in enumerate(model.layers) for x in "kv"]
    empty = [torch.empty(before + length, s.num_kv_heads, s.head_dim, dtype=model.dtype, device=model.device) for _, s in kinds]
    for (name, _), t in zip(kinds, empty, strict=True):
        for prefix, start in zip(after, starts.tolist(), strict=False):
            t[start : start + prefix.length] = prefix.kv[name].to(t)
    slots = torch.arange(before, before + length, dtype=torch.int32, device=model.device)
    last = torch.tensor([length - 1], device=model.device)
    model.forward(replace(plan, arena=Arena(_pairs(empty), torch.empty(0, dtype=torch.int32)), slots=slots, logits_at=last), tokens)
    return _pairs([t[before:].to(parameter_dtype(model.dtype)) for t in empty])


def parameter_dtype(compute: torch.dtype) -> torch.dtype:
    """The dtype of trained tensors: fp32, fp64 where the base computes in fp64."""
    return torch.float64 if compute == torch.float64 else torch.float32


def kv_of(prefix: Prefix, num_layers: int) -> list[LayerKV]:
    """A prefix's tensors as a list by layer."""
    return [(prefix.kv[f"self.{i}.k"], prefix.kv[f"self.{i}.v"]) for i in range(num_layers)]


@dataclass
class PrefixParameters:
    """The trained parameters of n prefixes of equal length.

    Attributes:
        shapes: Heads of every layer.
        num_prefixes: n.
        length: P.
        leaves: What the forward sees: per layer keys and values ``[n * P, H, D]``, all with ``requires_grad``.
        params: What the optimizer adjusts, each with its rows per prefix: the leaves (P rows), or the stacked networks (1 row).
        dropout: Share of keys and values dropped while training.
        seed: Of the dropout.
    """

    shapes: tuple[LayerShape, ...]
    num_prefixes: int
    length: int
    leaves: list[LayerKV]
    params: list[tuple[Tensor, int]]
    dropout: float = 0.0
    seed: int = 0
    mlp: _StackedMLP | None = None
    _made: list[Tensor] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        shapes: tuple[LayerShape, ...],
        init: Sequence[list[LayerKV] | None],
        config: PrefixConfig,
        *,
        mlp: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PrefixParameters:
        """Parameters of ``len(init)`` prefixes.

        Args:
            shapes: Heads of every layer.
            init: Of each prefix keys and values ``[P, H, D]`` by layer, or None: random.
            config: Length, width of the MLP, dropout.
            mlp: Train the network that makes the prefix; with an init it starts as exactly that (the last layer is zero and the init is added).
            seed: Random numbers are drawn as by a lone prefix with this seed, so every prefix starts as it would alone.
            dtype: Of the parameters.
            device: Of the parameters.

        Raises:
            ConfigError: If the MLP meets layers of different shapes.
        """
        n, p = len(init), config.prefix_length
        filled = [kv or drawn for drawn in [_random(shapes, p, seed)] for kv in init]
        start = [_stack(filled, layer, dtype, device) for layer in range(len(shapes))]
        common = (shapes, n, p)
        if not mlp:
            leaves = [(k.requires_grad_(), v.requires_grad_()) for k, v in start]
            return cls(*common, leaves, [(t, p) for kv in leaves for t in kv], config.prefix_dropout, seed)
        if len(set(shapes)) != 1:
            msg = "reparameterization 'mlp': expected layers of one shape, got several; use 'none'"
            raise ConfigError(msg)
        network = _StackedMLP(shapes, config, init, start if any(kv is not None for kv in init) else None, seed, dtype, device)
        made = cls(*common, [], [(t, 1) for t in network.parameters()], config.prefix_dropout, seed, network)
        made.refresh(np.zeros(n, np.int64))
        return made

    @property
    def rows(self) -> np.ndarray:
        """int32 ``[n, 2]``: first row and rows of each prefix in the leaves."""
        starts = np.arange(self.num_prefixes, dtype=np.int32) * self.length
        return np.stack([starts, np.full_like(starts, self.length)], 1)

    @property
    def num_trained(self) -> int:
        """Numbers adjusted for one prefix."""
        return sum(t.numel() for t, _ in self.params) // self.num_prefixes

    def refresh(self, steps: np.ndarray) -> None:
        """Make the leaves of the coming step.

        Args:
            steps: int64 ``[n]``: each prefix's own step, which decides its dropout.
        """
        if self.mlp is None and not self.dropout:
            self.leaves, self._made = _pairs([t for t, _ in self.params]), []
            return
        flat = [t for t, _ in self.params] if self.mlp is None else self.mlp()
        if self.dropout:
            flat = [t * keep for t, keep in zip(flat, self._keep(flat, steps), strict=True)]
        self._made = flat
        self.leaves = _pairs([t.detach().requires_grad_() for t in flat])

    def backward(self) -> None:
        """Carry the leaves' gradients to the parameters; once a step, after the last micro-batch."""
        if self._made:
            pairs = [(made, leaf.grad) for made, leaf in zip(self._made, (t for kv in self.leaves for t in kv), strict=True) if leaf.grad is not None]
            torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])
            self._made = []

    @torch.no_grad()
    def extract(self) -> list[dict[str, Tensor]]:
        """The prefixes as they are now, without dropout, by tensor name."""
        flat = [t for t, _ in self.params] if self.mlp is None else self.mlp()
        split = [t.detach().view(self.num_prefixes, self.length, *t.shape[1:]).cpu() for t in flat]
        return [{f"self.{i // 2}.{'kv'[i % 2]}": t[p].clone() for i, t in enumerate(split)} for p in range(self.num_prefixes)]

    def _keep(self, flat: list[Tensor], steps: np.ndarray) -> list[Tensor]:
        """Dropout factors, 0 or 1 / (1 - dropout), a hash of (seed, the prefix's step, tensor, row, element): the same whoever else is trained."""
        step = torch.from_numpy(steps).to(flat[0].device)[:, None, None]
        row = torch.arange(self.length, device=flat[0].device)[None, :, None]
        keep = []
        for i, t in enumerate(flat):
            element = torch.arange(t[0].numel(), device=t.device)[None, None]
            bits = mix(mix(mix(mix(step + self.seed * GOLDEN) + i) + row) + element)
            uniform = (bits >> 9).to(t.dtype) / 2**23
            keep.append(((uniform >= self.dropout).to(t.dtype) / (1 - self.dropout)).view(t.shape))
        return keep


class _StackedMLP(nn.Module):
    """n reparameterization networks side by side: embedding ``[P, E]``, linear to ``hidden``, tanh, linear to ``2 * L * E`` (Li & Liang 2021, section 4.3)."""

    def __init__(
        self,
        shapes: tuple[LayerShape, ...],
        config: PrefixConfig,
        init: Sequence[list[LayerKV] | None],
        start: list[LayerKV] | None,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.shape, n, p = shapes[0], len(init), config.prefix_length
        width, hidden = self.shape.num_kv_heads * self.shape.head_dim, config.encoder_hidden_size
        with torch.random.fork_rng(devices=[]):  # in the order in which PEFT draws them: a run with its seed starts at its weights
            torch.manual_seed(seed)
            embedding, first, second = nn.Embedding(p, width), nn.Linear(width, hidden), nn.Linear(hidden, 2 * len(shapes) * width)

        def stacked(t: Tensor) -> nn.Parameter:
            return nn.Parameter(t.detach().to(device, dtype).expand(n, *t.shape).clone())

        self.embedding, self.w1, self.b1 = stacked(embedding.weight), stacked(first.weight.T), stacked(first.bias)
        self.w2, self.b2 = stacked(second.weight.T), stacked(second.bias)
        self.start = start
        self.from_text = torch.tensor([kv is not None for kv in init], device=device)
        if start is not None:
            with torch.no_grad():
                self.w2[self.from_text] = 0
                self.b2[self.from_text] = 0

    def forward(self) -> list[Tensor]:
        """Per layer keys and values ``[n * P, H, D]``, flattened to one list k0, v0, k1, ..."""
        hidden = torch.tanh(torch.baddbmm(self.b1[:, None], self.embedding, self.w1))
        flat = torch.baddbmm(self.b2[:, None], hidden, self.w2)  # [n, P, 2 * L * E]
        layers = flat.flatten(0, 1).unflatten(1, (-1, self.shape.num_kv_heads, self.shape.head_dim)).unbind(1)
        if self.start is None:
            return list(layers)
        given = self.from_text.repeat_interleave(self.embedding.shape[1])[:, None, None]
        return [made + torch.where(given, base, 0) for made, base in zip(layers, (t for kv in self.start for t in kv), strict=True)]


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
