"""Callbacks that send the log of a run to TensorBoard or Weights & Biases."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError
from prefixfast.training.callbacks import Callback

if TYPE_CHECKING:
    from prefixfast.training.train_run import TrainRun


def make_reporter(kind: Literal["tensorboard", "wandb"], folder: str | None) -> Callback:
    """Make a callback that sends the numbers of the log to another program.

    Args:
        kind: Name of the program.
        folder: Folder for the program's files, None for the program's default.

    Raises:
        ConfigError: If the program's library is not installed.
    """
    try:
        return _TensorBoard(folder) if kind == "tensorboard" else _WandB(folder)
    except ImportError as e:
        msg = f"report_to={kind!r}: {kind} is not installed: pip install {kind}, or report_to='none'"
        raise ConfigError(msg) from e


class _TensorBoard(Callback):
    def __init__(self, folder: str | None) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)

    def on_log(self, line: dict[str, JSON]) -> None:
        for key, value in _flat_numbers(line).items():
            self.writer.add_scalar(key, value, line["step"])

    def on_train_end(self, run: TrainRun) -> None:
        self.writer.close()


class _WandB(Callback):
    def __init__(self, folder: str | None) -> None:
        self.run = importlib.import_module("wandb").init(project="prefixfast", dir=folder)

    def on_log(self, line: dict[str, JSON]) -> None:
        if numbers := _flat_numbers(line):
            self.run.log(numbers, step=line["step"])

    def on_train_end(self, run: TrainRun) -> None:
        self.run.finish()


def _flat_numbers(line: dict[str, JSON]) -> dict[str, Any]:
    """Numbers of a log line by name, nested names joined with a slash; empty for a line without a step."""
    if "step" not in line:
        return {}
    flat: dict[str, Any] = {
        k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "seconds")
    }
    nested = {f"{k}/{name}": v for k, inner in line.items() if isinstance(inner, dict) for name, v in inner.items()}
    return flat | nested
