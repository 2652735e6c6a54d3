"""`StepClock`, which times the steps of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from prefixfast.training.callbacks import Callback

T = TypeVar("T")


class StepClock(Callback, Generic[T]):
    """Training callback that records the end and the loss of each step.

    Attributes:
        times: Reading of the clock at the end of each step.
        losses: Loss of the first prefix in each step.
    """

    def __init__(self, now: Callable[[], T]) -> None:
        """Record nothing yet.

        Args:
            now: Clock.
        """
        self.now = now
        self.times: list[T] = []
        self.losses: list[float] = []

    def on_step(self, step: int, losses: Tensor, grad_norms: Tensor, active: Tensor) -> None:
        """Record one step, as `prefixfast.training.callbacks.Callback` describes."""
        self.losses.append(float(losses[0]))
        self.times.append(self.now())
