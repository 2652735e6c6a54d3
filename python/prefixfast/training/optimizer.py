"""`PrefixAdamW`, AdamW over many prefixes in shared tensors, with the result of torch.optim.AdamW on each prefix alone.

Shape letters: n prefixes, m of them with rows in a tensor, r rows of one prefix in it (P for keys and values, 1 for a
stacked network).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast.training.prefix_tensor import PrefixTensor

BETAS = (0.9, 0.999)  # decay rates of the two moments, torch's defaults
EPS = 1e-8  # added to the denominator, torch's default
# Largest number of elements that one call of an operator updates, unless a parameter has more. On a CPU they stay in
# its cache with their moments.
PILE_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class _Pile:
    """Parameters of one shape, dtype and rate with rows of the same m prefixes, and their moments in one storage each.

    Attributes:
        numbers: Numbers of the parameters.
        params: Parameters ``[m * r, ...]``, t of them.
        mean: First moments ``[t, m, r * ...]``.
        square: Second moments ``[t, m, r * ...]``.
    """

    numbers: list[int]
    params: list[PrefixTensor]
    mean: Tensor
    square: Tensor

    @classmethod
    def make(cls, numbers: list[int], params: list[PrefixTensor], num_prefixes: int) -> _Pile:
        """Parameters with moments of zero."""
        first, owners, _ = params[0]
        size = len(params), num_prefixes if owners is None else len(owners), -1
        mean, square = (torch.zeros_like(first).expand(len(params), *first.shape).reshape(size) for _ in range(2))
        return cls(numbers, params, mean.contiguous(), square.contiguous())

    @property
    def kind(self) -> tuple[object, ...]:
        """What piles with the same factors have in common."""
        return _kind(self.params[0])

    def with_gradient(self) -> Iterator[_Pile]:
        """The parts of the pile whose parameters have a gradient: all of it, or one parameter at a time."""
        has = [p.tensor.grad is not None for p in self.params]
        if all(has):
            yield self
            return
        for i in (i for i, own in enumerate(has) if own):
            at = slice(i, i + 1)
            yield _Pile(self.numbers[at], self.params[at], self.mean[at], self.square[at])

    def gradients(self) -> Tensor:
        """Copy of the gradients ``[t, m, r * ...]``."""
        return torch.stack([p.tensor.grad for p in self.params if p.tensor.grad is not None]).view(self.mean.shape)

    def square_sums(self) -> Tensor:
        """Sum of the squares of each prefix's own gradient by parameter, fp64 ``[t, m]``."""
        return self.gradients().square_().sum(2, dtype=torch.float64)

    def update(self, f: _Factors, *, decays: bool) -> None:
        """Update parameters and moments, and clear the gradients."""
        grad = self.gradients().mul_(f.clip).masked_fill_(f.is_skipped, 0.0)
        self.mean.lerp_(grad, f.mean)
        self.square.lerp_(grad.square_(), f.square)
        below = torch.sqrt(self.square, out=grad).div_(f.root).add_(EPS)
        change = (f.size * self.mean).div_(below)
        tensors = [p.tensor for p in self.params]
        if decays:
            torch._foreach_mul_([t.view(self.mean.shape[1:]) for t in tensors], [f.decay] * len(tensors))
        torch._foreach_sub_(tensors, list(change.view(len(tensors), *tensors[0].shape)))
        for t in tensors:
            t.grad = None


class _Factors(NamedTuple):
    """Factors of one step for the m prefixes of a pile, ``[m, 1]`` in its dtype.

    Attributes:
        clip: Factor of the gradient.
        mean: Weight of the gradient in the first moment.
        square: Weight of its square in the second moment.
        decay: Factor of the parameters.
        size: Learning rate over the bias correction of the first moment.
        root: Root of the bias correction of the second moment.
        is_skipped: Whether the prefix is not updated, bool.
    """

    clip: Tensor
    mean: Tensor
    square: Tensor
    decay: Tensor
    size: Tensor
    root: Tensor
    is_skipped: Tensor


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
        self.piles = [_Pile.make(numbers, [params[i] for i in numbers], num_prefixes) for numbers in _piles(params)]
        self.num_params, self.num_prefixes = len(params), num_prefixes
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
        piles = [part for pile in self.piles for part in pile.with_gradient()]
        norm = self._norms(piles)
        updated = active & norm.isfinite()
        self.steps += updated
        limit = torch.as_tensor(max_norm, dtype=torch.float64, device=norm.device)
        clip = torch.where(limit > 0, (limit / (norm + 1e-6)).clamp(max=1.0), 1.0)
        beta1, beta2 = BETAS
        rate = torch.where(updated, lr.to(torch.float64), 0.0)
        safe = self.steps.clamp(min=1)
        size, root = rate / (1 - beta1**safe), (1 - beta2**safe).sqrt()
        on_size = updated.to(torch.float64)
        kinds = {pile.kind: pile.params[0] for pile in piles}
        made: dict[tuple[object, ...], _Factors] = {}
        for kind, (param, owners, factor) in kinds.items():
            own_rate, own_size = (rate, size) if factor == 1 else (rate * factor, size * factor)
            weights = (clip, on_size * (1 - beta1), on_size * (1 - beta2), 1 - own_rate * self.weight_decay)
            every = torch.stack([*weights, own_size, root])
            own = (every, ~updated) if owners is None else (every[:, owners], ~updated[owners])
            made[kind] = _Factors._make([*own[0].to(param.dtype)[..., None], own[1][:, None]])
        for pile in piles:
            pile.update(made[pile.kind], decays=self._decays)
        return norm, updated

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name, for `load`."""
        moments = {
            f"{kind}.{number}": own.view(p.tensor.shape)
            for pile in self.piles
            for kind, moment in (("mean", pile.mean), ("square", pile.square))
            for number, p, own in zip(pile.numbers, pile.params, moment, strict=True)
        }
        return {"steps": self.steps, **moments}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state`."""
        for name, own in self.state().items():
            own.copy_(state[name])

    def _norms(self, piles: Sequence[_Pile]) -> Tensor:
        """Gradient norm of each prefix, fp64 ``[n]``, from sums over the prefix's own rows alone."""
        sums = torch.zeros(self.num_params, self.num_prefixes, dtype=torch.float64, device=self.steps.device)
        for pile in piles:
            numbers = torch.tensor(pile.numbers, device=sums.device)
            owners = pile.params[0].owners
            at = (numbers,) if owners is None else (numbers[:, None], owners)
            sums[at] = pile.square_sums()
        return sums.cumsum(0)[-1].sqrt()  # one after another, so that other prefixes do not change the order


def _piles(params: Sequence[PrefixTensor]) -> Iterable[list[int]]:
    """Numbers of parameters of one shape, dtype and owners, in piles of `PILE_NUMEL` elements at most."""
    most = PILE_NUMEL.get(params[0].tensor.device.type, PILE_NUMEL["cpu"])
    piles: dict[tuple[object, ...], list[list[int]]] = {}
    for i, p in enumerate(params):
        alike = piles.setdefault((p.tensor.shape, *_kind(p)), [[]])
        if alike[-1] and (len(alike[-1]) + 1) * p.tensor.numel() > most:
            alike.append([])
        alike[-1].append(i)
    return (numbers for alike in piles.values() for numbers in alike)


def _kind(param: PrefixTensor) -> tuple[object, ...]:
    return param.tensor.dtype, None if param.owners is None else id(param.owners), param.rate


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
