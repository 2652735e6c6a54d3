"""Which state of each prefix is kept, and when it has trained long enough: both by its own evaluations only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Best:
    """The best state of each of n prefixes so far.

    Attributes:
        loss: fp64 ``[n]``, infinite before the first evaluation.
        step: int64 ``[n]``: steps done then, 0 for none.
        waited: int64 ``[n]``: evaluations since.
        kept: Keys and values of that state ``[n * P, H, D]``, k0, v0, k1, ...; empty if the last state is wanted.
    """

    loss: Tensor
    step: Tensor
    waited: Tensor
    kept: list[Tensor]

    @classmethod
    def new(cls, flat: list[Tensor], count: int) -> Best:
        """Nothing yet; ``flat``: tensors of the shapes to keep."""
        zeros = torch.zeros(count, dtype=torch.int64)
        return cls(
            torch.full((count,), torch.inf, dtype=torch.float64),
            zeros,
            zeros.clone(),
            [torch.zeros_like(t) for t in flat],
        )

    def update(self, evaluated: Tensor, loss: Tensor, step: int, flat: list[Tensor]) -> None:
        """Take in evaluations.

        Args:
            evaluated: Bool ``[n]``.
            loss: fp64 ``[n]``, read where evaluated.
            step: Steps done.
            flat: The prefixes as evaluated, in the shapes of ``kept``.
        """
        better = evaluated & (loss < self.loss)  # NaN is never better
        self.loss = torch.where(better, loss, self.loss)
        self.step = torch.where(better, step, self.step)
        self.waited = torch.where(evaluated, torch.where(better, 0, self.waited + 1), self.waited)
        if self.kept and bool(better.any()):
            for own, now in zip(self.kept, flat, strict=True):
                rows = better.to(now.device).repeat_interleave(len(now) // len(better))[:, None, None]
                own.copy_(torch.where(rows, now, own))

    def exhausted(self, patience: Tensor) -> Tensor:
        """Bool ``[n]``: as many evaluations without a better one as ``patience`` int64 ``[n]`` allows (0: no limit)."""
        return (patience > 0) & (self.waited >= patience)

    def state(self) -> dict[str, Tensor]:
        """To be saved; what `load` takes."""
        return {
            "loss": self.loss,
            "step": self.step,
            "waited": self.waited,
            **{f"kept.{i}": t for i, t in enumerate(self.kept)},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, own in self.state().items():
            own.copy_(state[name])
