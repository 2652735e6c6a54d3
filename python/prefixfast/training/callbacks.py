"""`Callback`, the hooks that a training run calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, shown
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.training.train_run import TrainRun


class Callback:
    """Base class of callbacks. Override the hooks that you need; the others do nothing.

    A hook finds the base model as it was before the run, so that `generate` and `score` work in it as after the run. A
    hook that raises ends the run with its error. The base model is then detached and restored as
    usual, and the last checkpoint stays. Any object with some of the hooks works in place of a subclass.

    Shape letter: n prefixes of the group.

    Example:
        >>> class Printer(Callback):
        ...     def on_prefix_end(self, name, prefix, metrics):
        ...         print(name, metrics["steps"])
        >>> prefix = train(base, rows, max_steps=2, callbacks=[Printer()])
        prefix 2.0
    """

    def on_train_begin(self, names: Sequence[str], steps: int) -> None:
        """Called before the first step of each group of prefixes.

        Args:
            names: Names of the prefixes, in the order of the tensors of the other hooks.
            steps: Largest number of steps of a prefix.
        """

    def on_step(self, step: int, losses: Tensor, grad_norms: Tensor, active: Tensor) -> None:
        """Called after an optimizer step.

        Args:
            step: Number of the step, from 1.
            losses: Training losses, fp64 ``[n]``.
            grad_norms: Gradient norms, fp64 ``[n]``.
            active: Prefixes that took the step, bool ``[n]``.
        """

    def on_log(self, line: dict[str, JSON]) -> None:
        """Called for each line of the log.

        Args:
            line: Values by name, as in ``log.jsonl``.
        """

    def on_evaluate(self, step: int, losses: dict[str, float]) -> None:
        """Called after an evaluation, of which the first is before the first step.

        Args:
            step: Number of the step, from 1; 0 before the first step.
            losses: Evaluation losses by name, of the prefixes that were evaluated.
        """

    def on_prefix_end(self, name: str, prefix: Prefix | TunedWeights, metrics: dict[str, float]) -> None:
        """Called when a prefix is finished and saved.

        Args:
            name: Name of the prefix.
            prefix: Trained prefix, or the weights of a method that trains weights.
            metrics: Metrics of the prefix, as in `TrainRun.metrics`.
        """

    def on_prefix_failed(self, name: str, error: str) -> None:
        """Called when a prefix ends without a result.

        Args:
            name: Name of the prefix.
            error: Error message, as in `TrainRun.failed`.
        """

    def on_train_end(self, run: TrainRun) -> None:
        """Called at the end of the run.

        Args:
            run: Result of the run.
        """


HOOKS = tuple(n for n in vars(Callback) if n.startswith("on_"))


class CallbackList:
    """Calls the hooks of several callbacks.

    Args:
        callbacks: Objects with some of the hooks.

    Raises:
        ConfigError: If an object has no hook, or a method ``on_...`` that is not a hook.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        callback: Any  # the objects can be anything
        if not isinstance(callbacks, list | tuple):
            msg = f"callbacks: expected a list of callbacks, got {shown(callbacks)}"
            raise ConfigError(msg)
        for i, callback in enumerate(callbacks):
            own = {n for n in dir(callback) if n.startswith("on_")}
            if isinstance(callback, type) or not own or own - set(HOOKS):
                of_object = f"{type(callback).__name__} with {sorted(own) or 'none'}"
                is_class = isinstance(callback, type)
                got = f"the class {callback.__name__}; give an object" if is_class else of_object
                msg = f"callbacks[{i}]: expected an object with some of {', '.join(HOOKS)}, got {got}"
                raise ConfigError(msg)
        self.callbacks = list(callbacks)

    def has(self, hook: str) -> bool:
        """Whether a callback has a hook, other than the empty one of `Callback`.

        Args:
            hook: Name of the hook.
        """
        own = (getattr(callback, hook, None) for callback in self.callbacks)
        empty = (None, getattr(Callback, hook))
        return any(getattr(function, "__func__", function) not in empty for function in own)

    def call(self, hook: str, *values: Any) -> None:
        """Call one hook of every callback that has it.

        Args:
            hook: Name of the hook.
            values: Arguments of the hook.
        """
        for callback in self.callbacks:
            if function := getattr(callback, hook, None):
                function(*values)
