"""Training runs that end before their last step."""

from __future__ import annotations


class Cut(Exception):
    pass


class CutAt:
    """Ends a run after the update of a step and before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step, losses, grad_norms, active):
        if step == self.step:
            raise Cut
