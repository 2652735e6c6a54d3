"""`PrefixAdamW`: AdamW over many prefixes in shared tensors, equal to torch.optim.AdamW on each prefix alone.

Shape letters: n prefixes, r rows of one prefix in a tensor (P in a leaf, 1 in a stacked network).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _State:
    param: Tensor
    rows: int
    mean: Tensor
    square: Tensor


class PrefixAdamW:
    """AdamW whose step count, rate, clipping and activity are vectors over prefixes.

    Args:
        params: Tensors ``[n * r, ...]`` with r; rows ``i * r`` to ``(i + 1) * r`` belong to prefix i. All tensors of a prefix share its gradient norm.
        num_prefixes: n.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, one for all or fp64 ``[n]``.

    Source:
        Loshchilov & Hutter 2019 (arXiv:1711.05101), as torch.optim.AdamW computes it.
    """

    def __init__(
        self,
        params: list[tuple[Tensor, int]],
        num_prefixes: int,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        self.states = [_State(p, r, torch.zeros_like(p), torch.zeros_like(p)) for p, r in params]
        self.num_prefixes, self.betas, self.eps = num_prefixes, betas, eps
        self.steps = torch.zeros(num_prefixes, dtype=torch.float64, device=params[0][0].device)
        self.weight_decay = torch.as_tensor(weight_decay, dtype=torch.float64, device=self.steps.device)
        self._decays = bool((self.weight_decay != 0).any())

    @torch.no_grad()
    def step(self, lr: Tensor, active: Tensor, max_norm: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """One update of the active prefixes from the tensors' ``grad``, which is cleared.

        Args:
            lr: Rate of each prefix ``[n]``.
            active: Bool ``[n]``; the others keep parameters, moments and step count.
            max_norm: Clip each prefix's gradient to this norm, as torch's clip_grad_norm_; one for all or fp64 ``[n]``; 0 for none.

        Returns:
            Gradient norms ``[n]`` fp64 and, bool ``[n]``, which prefixes were updated: active ones whose norm is finite.
        """
        norm = self._norms()
        updated = active & norm.isfinite()
        self.steps += updated
        limit = torch.as_tensor(max_norm, dtype=torch.float64, device=norm.device)
        clip = torch.where(limit > 0, (limit / (norm + 1e-6)).clamp(max=1.0), 1.0)
        beta1, beta2 = self.betas
        rate = torch.where(updated, lr.to(torch.float64), 0.0)
        safe = self.steps.clamp(min=1)
        size, root = rate / (1 - beta1**safe), (1 - beta2**safe).sqrt()
        on_size = updated.to(torch.float64)
        for s in self.states:
            grad, shape = s.param.grad, (-1, *[1] * (s.param.ndim - 1))
            if grad is None:
                continue

            def by_row(x: Tensor, s: _State = s, shape: tuple[int, ...] = shape) -> Tensor:
                return x.to(s.param.dtype).repeat_interleave(s.rows).view(shape)

            on = updated.repeat_interleave(s.rows).view(shape)
            grad = torch.where(on, grad * by_row(clip), 0.0)
            s.mean.lerp_(grad, by_row(on_size * (1 - beta1)))
            s.square.lerp_(grad * grad, by_row(on_size * (1 - beta2)))
            if self._decays:
                s.param.mul_(by_row(1 - rate * self.weight_decay))
            s.param.sub_(by_row(size) * s.mean / (s.square.sqrt() / by_row(root) + self.eps))
            s.param.grad = None
        return norm, updated

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name, to be saved; what `load` takes."""
        moments = {f"{kind}.{i}": getattr(s, kind) for i, s in enumerate(self.states) for kind in ("mean", "square")}
        return {"steps": self.steps, **moments}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, own in self.state().items():
            own.copy_(state[name])

    def _norms(self) -> Tensor:
        """Gradient norm of each prefix: row sums, then rows in order; nothing of another prefix takes part."""
        total = torch.zeros(self.num_prefixes, dtype=torch.float64, device=self.steps.device)
        for s in self.states:
            if s.param.grad is not None:
                total += s.param.grad.reshape(self.num_prefixes, -1).square().sum(1, dtype=torch.float64)
        return total.sqrt()


def learning_rates(step: Tensor, total: Tensor, *, peak: float | Tensor, warmup: int | Tensor, kind: str) -> Tensor:
    """Rate of each prefix at its own step, as transformers' schedules with warm-up give it.

    Args:
        step: Steps done so far ``[n]``.
        total: Steps in all ``[n]``.
        peak: Highest rate, one or ``[n]``.
        warmup: Steps of the linear rise from zero, one or ``[n]``.
        kind: ``"linear"``, ``"cosine"`` or ``"constant"``.
    """
    step, total, warmup = step.to(torch.float64), total.to(torch.float64), torch.as_tensor(warmup, dtype=torch.float64)
    rising = step / warmup.clamp(min=1)
    left = ((total - step) / (total - warmup).clamp(min=1)).clamp(min=0)
    falling = {"linear": left, "cosine": (1 - torch.cos(math.pi * left)) / 2, "constant": torch.ones_like(step)}[kind]
    return peak * torch.where(step < warmup, rising, falling)
