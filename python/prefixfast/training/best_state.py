"""`BestState`: the state of each prefix at its lowest evaluation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast.training.prefix_tensor import PrefixTensor


@dataclass
class BestState:
    """The best state of each of n prefixes so far.

    Attributes:
        loss: Lowest evaluation loss, fp64 ``[n]``, infinite before the first evaluation.
        step: Number of steps at the lowest loss, int64 ``[n]``, 0 before the first evaluation.
        num_worse: Number of evaluations since then, int64 ``[n]``.
        kv: Tensors of the result at the lowest loss, such as keys and values in the order k0, v0, k1, ..., each with
            the prefixes that have rows in it; empty if the last state is wanted.
    """

    loss: Tensor
    step: Tensor
    num_worse: Tensor
    kv: list[PrefixTensor]

    @classmethod
    def new(cls, flat: Sequence[PrefixTensor], count: int) -> BestState:
        """State before the first evaluation.

        Args:
            flat: Tensors of the shapes of ``kv``.
            count: Number of prefixes n.
        """
        loss = torch.full((count,), torch.inf, dtype=torch.float64)
        step, num_worse = (torch.zeros(count, dtype=torch.int64) for _ in range(2))
        return cls(loss, step, num_worse, [t._replace(tensor=torch.zeros_like(t.tensor)) for t in flat])

    def update(self, evaluated: Tensor, loss: Tensor, step: int, flat: Sequence[PrefixTensor]) -> None:
        """Record an evaluation.

        Args:
            evaluated: Prefixes that were evaluated, bool ``[n]``.
            loss: Evaluation losses, fp64 ``[n]``, which count where ``evaluated`` is set.
            step: Number of finished steps.
            flat: Tensors that were evaluated, in the shapes of ``kv``.
        """
        better = evaluated & (loss < self.loss)  # NaN is never better
        self.loss = torch.where(better, loss, self.loss)
        self.step = torch.where(better, step, self.step)
        self.num_worse = torch.where(evaluated, torch.where(better, 0, self.num_worse + 1), self.num_worse)
        if self.kv and bool(better.any()):
            for own, now in zip(self.kv, flat, strict=True):
                is_better = own.by_row(better.to(own.tensor.device))
                own.tensor.copy_(torch.where(is_better, now.tensor, own.tensor))

    def has(self, i: int) -> bool:
        """Whether prefix ``i`` has a best state."""
        return bool(self.kv) and int(self.step[i]) > 0

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for `load`; the names are those of checkpoints."""
        kv = {name: t.tensor for name, t in self.named().items()}
        return {"loss": self.loss, "step": self.step, "waited": self.num_worse, **kv}

    def named(self) -> dict[str, PrefixTensor]:
        """Tensors ``kv`` by their names in `state`."""
        return {f"kept.{i}": t for i, t in enumerate(self.kv)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `state`."""
        for name, own in self.state().items():
            own.copy_(state[name])
