"""`Applied`, which puts what is trained into the base model for steps and takes it out for everybody else."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from prefixfast.model.guard import BaseGuard
    from prefixfast.training.methods.state import MethodState


class Applied:
    """Trained state of a method, in the base model or out of it.

    It stays in from step to step. Code of the user and other threads find the base model as it was.

    Args:
        params: Trained state of the method.
        guard: Guard of the base model.
    """

    def __init__(self, params: MethodState, guard: BaseGuard) -> None:
        self.params, self.guard = params, guard
        self._context = contextlib.ExitStack()
        self._is_in = False

    def put_in(self) -> None:
        """Put what is trained into the base model, unless it is there. Waits for runs of other threads."""
        if not self._is_in:
            self._context.enter_context(self.params.applied())
            self._is_in = True

    def take_out(self) -> None:
        """Give the base model back as it was."""
        self._is_in = False
        self._context.close()

    def let_others_in(self) -> None:
        """Give the base model back if another thread waits for it."""
        if self.guard.is_awaited:
            self.take_out()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.take_out()
