"""Callbacks: objects that are told how a run goes; any subset of the hooks of `Callback`. The senders to TensorBoard and Weights & Biases are two of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from prefixfast.errors import ConfigError
from prefixfast.prefix.prefix import Prefix

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.training.train_run import TrainRun


class Callback:
    """The hooks; each does nothing here. An object given in ``callbacks`` needs only those that it wants, and need not be of this class.

    A hook that raises ends the run with its error: the model is given back as it was, the last checkpoint stays.

    Example:
        >>> class Printer:
        ...     def on_prefix_end(self, name, prefix, metrics):
        ...         print(name, metrics["steps"])
        >>> prefix = train(base, rows, max_steps=2, callbacks=[Printer()])
        prefix 2.0
    """

    def on_train_begin(self, names: Sequence[str], steps: int) -> None:
        """Before the first step of each group of prefixes: their names, in the order of the tensors below, and the most steps that one of them takes."""

    def on_step(self, step: int, losses: Tensor, grad_norms: Tensor, active: Tensor) -> None:
        """After an optimizer step (counted from 1): fp64 ``[n]`` loss and gradient norm, and bool ``[n]`` which prefixes took it."""

    def on_log(self, line: dict[str, Any]) -> None:
        """A line of the log."""

    def on_evaluate(self, step: int, losses: dict[str, float]) -> None:
        """Evaluation losses of the prefixes that were evaluated."""

    def on_prefix_end(self, name: str, prefix: Prefix, metrics: dict[str, float]) -> None:
        """A prefix is finished and saved."""

    def on_prefix_failed(self, name: str, error: str) -> None:
        """A prefix ends without a result."""

    def on_train_end(self, run: TrainRun) -> None:
        """After everything."""


HOOKS = tuple(n for n in vars(Callback) if n.startswith("on_"))


class Hooks:
    """Calls the hooks of several objects.

    Args:
        callbacks: The objects.

    Raises:
        ConfigError: For an object without hooks, or with a name like a hook's that is none.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        for i, callback in enumerate(callbacks):
            own = {n for n in dir(callback) if n.startswith("on_")}
            if isinstance(callback, type) or not own or own - set(HOOKS):
                got = (
                    f"the class {callback.__name__}; give an object"
                    if isinstance(callback, type)
                    else f"{type(callback).__name__} with {sorted(own) or 'none'}"
                )
                msg = f"callbacks[{i}]: expected an object with some of {', '.join(HOOKS)}, got {got}"
                raise ConfigError(msg)
        self.callbacks = list(callbacks)

    def call(self, hook: str, *values: Any) -> None:
        """Call one hook of every object that has it."""
        for callback in self.callbacks:
            if function := getattr(callback, hook, None):
                function(*values)


def reporter(kind: Literal["tensorboard", "wandb"], folder: str | None) -> Any:
    """A callback that sends the log's numbers elsewhere.

    Args:
        kind: Where.
        folder: Of the run, for files.

    Raises:
        ConfigError: If the library is not installed.
    """
    try:
        return _TensorBoard(folder) if kind == "tensorboard" else _WandB(folder)
    except ImportError as e:
        msg = f"report_to={kind!r}: {kind} is not installed: pip install {kind}, or report_to='none'"
        raise ConfigError(msg) from e


class _TensorBoard:
    def __init__(self, folder: str | None) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)

    def on_log(self, line: dict[str, Any]) -> None:
        for key, value in _numbers(line).items():
            self.writer.add_scalar(key, value, line["step"])

    def on_train_end(self, run: TrainRun) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, folder: str | None) -> None:
        self.run = importlib.import_module("wandb").init(project="prefixfast", dir=folder)

    def on_log(self, line: dict[str, Any]) -> None:
        if numbers := _numbers(line):
            self.run.log(numbers, step=line["step"])

    def on_train_end(self, run: TrainRun) -> None:
        self.run.finish()


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """A line's numbers by name, nested ones joined with a slash; nothing for lines without a step."""
    if "step" not in line:
        return {}
    flat = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "seconds")}
    return flat | {
        f"{k}/{name}": v for k, inner in line.items() if isinstance(inner, dict) for name, v in inner.items()
    }
