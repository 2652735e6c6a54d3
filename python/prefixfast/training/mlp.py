"""The reparameterization networks of many prefixes, side by side in stacked tensors (Li & Liang 2021, section 4.3).

Shape letters: n prefixes, P rows of a prefix, L layers, H key-value heads, D head dimension, E = H * D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prefixfast.attention.plan import LayerKV
from prefixfast.config import PrefixConfig

FIT_LEARNING_RATE = 1e-4


class StackedMLP(nn.Module):
    """n networks: embedding ``[P, E]``, linear layer to the hidden size, tanh, linear layer to the keys and values.

    The last layer has the width of all keys and values of a row, ``2 * L * E`` where all layers have the same heads.

    A prefix with initial values starts as exactly these: the last layer of its network is zero, and the initial values
    are added to the output. With ``config.fit_steps`` the network is fitted to the initial values instead.

    Args:
        init: Initial keys and values by layer of each prefix, None for a random start. Equal ones are one object.
        start: Keys and values ``[n * P, H, D]`` by layer, which hold those of ``init`` and give P, dtype and device.
        config: Options of what is learned.
        seeds: Random seed of each prefix.
    """

    def __init__(
        self,
        init: Sequence[list[LayerKV] | None],
        start: list[LayerKV],
        config: PrefixConfig,
        seeds: Sequence[int],
    ) -> None:
        super().__init__()
        first = start[0][0]
        self.heads = [t.shape[1:] for kv in start for t in kv]
        sizes = len(first) // len(seeds), first[0].numel(), sum(h.numel() for h in self.heads)
        drawn = {s: _draw_mlp(*sizes, config, s) for s in set(seeds)}
        self.embedding, self.w1, self.b1, self.w2, self.b2 = (
            nn.Parameter(torch.stack([drawn[s][i] for s in seeds]).to(first.device, first.dtype)) for i in range(5)
        )
        self.has_init = torch.tensor([kv is not None for kv in init], device=first.device)
        self.start = start if bool(self.has_init.any()) else None
        if self.start is not None and config.fit_steps:
            self._fit(start, [(s, id(kv)) for s, kv in zip(seeds, init, strict=True)], config.fit_steps)
            self.start = None
        elif self.start is not None:
            with torch.no_grad():
                self.w2[self.has_init] = 0
                self.b2[self.has_init] = 0

    def forward(self) -> list[Tensor]:
        """Keys and values ``[n * P, H, D]`` by layer, in the order k0, v0, k1, ..."""
        flat = _run_mlp(self.embedding, self.w1, self.b1, self.w2, self.b2)
        parts = flat.flatten(0, 1).split([h.numel() for h in self.heads], 1)
        made = [part.unflatten(1, h) for part, h in zip(parts, self.heads, strict=True)]
        if self.start is None:
            return made
        has_init = self.has_init.repeat_interleave(self.embedding.shape[1])[:, None, None]
        start = (t for kv in self.start for t in kv)
        return [out + torch.where(has_init, first, 0) for out, first in zip(made, start, strict=True)]

    def _fit(self, start: list[LayerKV], kinds: list[tuple[int, int]], steps: int) -> None:
        """Fit the networks to the initial keys and values with Adam on the squared distance.

        Prefixes of the same kind (seed and initial values) are fitted once.

        Source:
            ``lowdata_init_train3`` of Li & Liang's code: 500 steps at 1e-4 on the linear layers, not on the embedding.
        """
        first = {kind: i for i, kind in reversed(list(enumerate(kinds))) if bool(self.has_init[i])}
        numbers = torch.tensor(list(first.values()), device=self.has_init.device)
        p = self.embedding.shape[1]
        by_layer = [t.unflatten(0, (-1, p))[numbers].flatten(2) for kv in start for t in kv]
        goal = torch.cat(by_layer, 2)  # [kinds, P, 2 * L * E]
        with torch.enable_grad():
            linear = [t.detach()[numbers].requires_grad_() for t in (self.w1, self.b1, self.w2, self.b2)]
            optimizer = torch.optim.Adam(linear, lr=FIT_LEARNING_RATE)
            for _ in range(steps):
                optimizer.zero_grad()
                (_run_mlp(self.embedding.detach()[numbers], *linear) - goal).square().mean((1, 2)).sum().backward()
                optimizer.step()
        number_of_kind = {kind: i for i, kind in enumerate(first)}
        with torch.no_grad():
            where = [number_of_kind[k] for k in kinds if k in number_of_kind]
            index = torch.tensor(where, device=self.has_init.device)
            for own, fitted in zip((self.w1, self.b1, self.w2, self.b2), linear, strict=True):
                own[self.has_init] = fitted.detach()[index]


def _draw_mlp(length: int, width: int, out: int, config: PrefixConfig, seed: int) -> tuple[Tensor, ...]:
    """Random weights of one network, drawn in PEFT's order, so that equal seeds give equal weights."""
    dim, hidden = config.embedding_dim or width, config.encoder_hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding, first = nn.Embedding(length, dim), nn.Linear(dim, hidden)
        second = nn.Linear(hidden, out)
    return tuple(t.detach() for t in (embedding.weight, first.weight.T, first.bias, second.weight.T, second.bias))


def _run_mlp(embedding: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Output ``[n, P, 2 * L * E]`` of the networks."""
    return torch.baddbmm(b2[:, None], torch.tanh(torch.baddbmm(b1[:, None], embedding, w1)), w2)
