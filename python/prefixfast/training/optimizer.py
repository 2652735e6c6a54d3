"""`PrefixAdamW`, AdamW over many prefixes in shared tensors, with the result of torch.optim.AdamW on each prefix alone.

Shape letters: n prefixes, m of them with rows in a tensor, r rows of one prefix in it (P for keys and values, 1 for a
stacked network).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast.training.prefix_tensor import PrefixTensor

BETAS = (0.9, 0.999)  # decay rates of the two moments, torch's defaults
EPS = 1e-8  # added to the denominator, torch's default


@dataclass
class _Moments:
    """A parameter ``[m * r, ...]``, and its first and second moment."""

    param: PrefixTensor
    mean: Tensor
    square: Tensor


class PrefixAdamW:
    """AdamW with a step count, learning rate, gradient clipping and activity for each prefix.

    Args:
        params: Tensors ``[m * r, ...]``, each with the prefixes that have rows in it. All tensors of a prefix share its
            gradient norm.
        num_prefixes: Number of prefixes n.
        weight_decay: Decoupled weight decay, one for all prefixes or fp64 ``[n]``.

    Source:
        Loshchilov & Hutter 2019 (arXiv:1711.05101), computed as in torch.optim.AdamW.
    """

    def __init__(
        self, params: Sequence[PrefixTensor], num_prefixes: int, *, weight_decay: float | Tensor = 0.0
    ) -> None:
        self.moments = [_Moments(p, torch.zeros_like(p.tensor), torch.zeros_like(p.tensor)) for p in params]
        self.num_prefixes = num_prefixes
        self.steps = torch.zeros(num_prefixes, dtype=torch.float64, device=params[0].tensor.device)
        self.weight_decay = torch.as_tensor(weight_decay, dtype=torch.float64, device=self.steps.device)
        self._decays = bool((self.weight_decay != 0).any())

    @torch.no_grad()
    def step(self, lr: Tensor, active: Tensor, max_norm: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """Update the active prefixes once from the gradients of the tensors, and clear the gradients.

        Args:
            lr: Learning rate of each prefix, ``[n]``.
            active: Prefixes to update, bool ``[n]``. Parameters, moments and step count of the others do not change.
            max_norm: Largest gradient norm, to which torch's clip_grad_norm_ would clip; one for all prefixes or fp64
                ``[n]``. 0 turns clipping off.

        Returns:
            Gradient norm of each prefix, fp64 ``[n]``; and the updated prefixes, bool ``[n]``, which are the active
            ones with a finite norm.
        """
        norm = self._norms()
        updated = active & norm.isfinite()
        self.steps += updated
        limit = torch.as_tensor(max_norm, dtype=torch.float64, device=norm.device)
        clip = torch.where(limit > 0, (limit / (norm + 1e-6)).clamp(max=1.0), 1.0)
        beta1, beta2 = BETAS
        rate = torch.where(updated, lr.to(torch.float64), 0.0)
        safe = self.steps.clamp(min=1)
        size, root = rate / (1 - beta1**safe), (1 - beta2**safe).sqrt()
        on_size = updated.to(torch.float64)
        for s in self.moments:
            param = s.param.tensor
            if param.grad is None:
                continue

            def by_row(x: Tensor, s: _Moments = s) -> Tensor:
                return s.param.by_row(x.to(s.param.tensor.dtype))

            grad = torch.where(s.param.by_row(updated), param.grad * by_row(clip), 0.0)
            s.mean.lerp_(grad, by_row(on_size * (1 - beta1)))
            s.square.lerp_(grad * grad, by_row(on_size * (1 - beta2)))
            factor = s.param.rate
            own_rate, own_size = (rate, size) if factor == 1 else (rate * factor, size * factor)
            if self._decays:
                param.mul_(by_row(1 - own_rate * self.weight_decay))
            param.sub_(by_row(own_size) * s.mean / (s.square.sqrt() / by_row(root) + EPS))
            param.grad = None
        return norm, updated

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name, for `load`."""
        moments = {f"{kind}.{i}": getattr(s, kind) for i, s in enumerate(self.moments) for kind in ("mean", "square")}
        return {"steps": self.steps, **moments}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state`."""
        for name, own in self.state().items():
            own.copy_(state[name])

    def _norms(self) -> Tensor:
        """Gradient norm of each prefix, fp64 ``[n]``, from sums over the prefix's own rows alone."""
        total = torch.zeros(self.num_prefixes, dtype=torch.float64, device=self.steps.device)
        for s in self.moments:
            if (grad := s.param.tensor.grad) is not None:
                own = grad.reshape(len(s.param.own(total)), -1).square().sum(1, dtype=torch.float64)
                total = total + own if s.param.owners is None else total.index_add(0, s.param.owners, own)
        return total.sqrt()


def learning_rates(step: Tensor, total: Tensor, *, peak: float | Tensor, warmup: int | Tensor, kind: str) -> Tensor:
    """Learning rate of each prefix at its own step, equal to the schedules with warm-up of transformers.

    Args:
        step: Number of finished steps, ``[n]``.
        total: Number of all steps, ``[n]``.
        peak: Largest learning rate, one for all prefixes or ``[n]``.
        warmup: Number of steps of the linear rise from zero, one for all prefixes or ``[n]``.
        kind: Schedule after the warm-up, ``"linear"``, ``"cosine"`` or ``"constant"``.
    """
    step, total, warmup = step.to(torch.float64), total.to(torch.float64), torch.as_tensor(warmup, dtype=torch.float64)
    rising = step / warmup.clamp(min=1)
    left = ((total - step) / (total - warmup).clamp(min=1)).clamp(min=0)
    falling = {"linear": left, "cosine": (1 - torch.cos(math.pi * left)) / 2, "constant": torch.ones_like(step)}[kind]
    return peak * torch.where(step < warmup, rising, falling)
