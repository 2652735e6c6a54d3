"""`GroupProgress`: the progress of each prefix of a group, updated after every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast.training.step import StepResult

# Steps in a row without a finite gradient after which a prefix fails: its parameters do not change in such steps, so
# that further steps rarely help.
MAX_NONFINITE_STEPS = 10
# Names of the tensors in checkpoints, by attribute.
CHECKPOINT_NAMES = {
    "active": "active",
    "first_loss": "first",
    "loss": "last",
    "eval_loss_before": "evaluation before",
    "eval_loss": "evaluation",
    "num_skipped": "skipped",
    "num_nonfinite": "streak",
    "num_done": "done",
}


@dataclass
class GroupProgress:
    """Progress of n prefixes.

    Attributes:
        total: Number of steps of each prefix, int64 ``[n]``.
        active: Prefixes that are still trained, bool ``[n]``.
        first_loss: Training loss of the first step, fp64 ``[n]``.
        loss: Last training loss, fp64 ``[n]``.
        eval_loss_before: Evaluation loss before the first step, fp64 ``[n]``.
        eval_loss: Last evaluation loss, fp64 ``[n]``.
        num_skipped: Number of steps without an update, int64 ``[n]``.
        num_nonfinite: Number of steps without an update since the last update, int64 ``[n]``.
        num_done: Number of finished steps, int64 ``[n]``.
    """

    total: Tensor
    active: Tensor
    first_loss: Tensor
    loss: Tensor
    eval_loss_before: Tensor
    eval_loss: Tensor
    num_skipped: Tensor
    num_nonfinite: Tensor
    num_done: Tensor

    @classmethod
    def new(cls, total: Tensor) -> GroupProgress:
        """Progress before the first step.

        Args:
            total: Number of steps of each prefix, int64 ``[n]``.
        """
        n = len(total)
        losses = (torch.zeros(n, dtype=torch.float64) for _ in range(4))
        counts = (torch.zeros(n, dtype=torch.int64) for _ in range(3))
        return cls(total, torch.ones(n, dtype=torch.bool), *losses, *counts)

    def record(self, result: StepResult) -> None:
        """Record the result of a step."""
        now = result.active
        self.first_loss = torch.where(now & (self.num_done == 0), result.losses, self.first_loss)
        self.num_done += now
        self.loss = torch.where(now, result.losses, self.loss)
        self.num_skipped += now & ~result.updated
        nonfinite = torch.where(result.updated, 0, self.num_nonfinite + 1)
        self.num_nonfinite = torch.where(now, nonfinite, self.num_nonfinite)

    @property
    def hopeless(self) -> Tensor:
        """Prefixes with too many steps in a row without an update, or whose steps all had none, bool ``[n]``."""
        never_updated = self.at_last_step & (self.num_skipped == self.num_done)
        return (self.num_nonfinite >= MAX_NONFINITE_STEPS) | never_updated

    @property
    def at_last_step(self) -> Tensor:
        """Prefixes that have taken all of their steps, bool ``[n]``."""
        return self.num_done == self.total

    def state(self) -> dict[str, Tensor]:
        """Tensors by their names in checkpoints, for `load`."""
        return {name: getattr(self, attribute) for attribute, name in CHECKPOINT_NAMES.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `state`."""
        for name, own in self.state().items():
            own.copy_(state[name])
