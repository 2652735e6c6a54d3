"""`Study`, the settings of a comparison, and its runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prefixfast
from prefixfast.studies.compare.variants import ARGUMENTS, Variant
from prefixfast.training.method import METHODS

FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")  # of a base
SAVE_STEPS = 50  # between checkpoints, of which a killed run loses the steps since the last
# Options that change no result, so that runs with other values are compared with each other.
IGNORED_OPTIONS = ("token_budget", "gradient_checkpointing", "save_steps", "logging_steps", "report_to")


@dataclass(frozen=True)
class Study:
    """Settings of a comparison, all of them values of JSON.

    Attributes:
        model: Hub id or folder of the base.
        data: File of the training rows.
        eval_data: File of the held-out rows, None if they are taken from ``data``.
        reading: Arguments of `train` that say how rows are read and become text.
        train: Options of training that all methods share.
        decoding: Fields of `GenerationParams` of the call.
        metrics: Names of metrics, None for those of the task.
        max_rows: Largest number of training rows, None for all.
        max_inputs: Largest number of held-out inputs, None for all.
        eval_fraction: Fraction of the inputs that is held out without ``eval_data``.
    """

    model: str
    data: str
    eval_data: str | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[str] | None = None
    max_rows: int | None = None
    max_inputs: int | None = None
    eval_fraction: float = 0.2

    def settings(self) -> dict[str, Any]:
        """Fields as values of JSON, with the names of base and files instead of their paths on this machine."""
        paths = {n: getattr(self, n) for n in ("model", "data", "eval_data")}
        return dataclasses.asdict(self) | {n: Path(v).name if v and Path(v).exists() else v for n, v in paths.items()}

    def identity(self, rows: str) -> str:
        """Hex digest of what all compared runs share.

        Args:
            rows: Digest of the rows.
        """
        training = {k: v for k, v in self.train.items() if k not in IGNORED_OPTIONS}
        shared: dict[str, Any] = {"train": training, "rows": rows}
        shared |= {"decoding": dict(self.decoding), "metrics": self.metrics and list(self.metrics)}
        return digest(shared | {"base": base_digest(self.model), "version": prefixfast.__version__})


@dataclass(frozen=True)
class StudyRun:
    """One training run of a comparison, with its evaluation: a method and a seed.

    Attributes:
        study: Settings of the comparison.
        shared: Identity of the comparison.
        rows: Digest of the rows.
        variant: Method with its options.
        seed: Seed of initial values, row order and dropout.
    """

    study: Study
    shared: str
    rows: str
    variant: Variant
    seed: int

    @property
    def label(self) -> str:
        """Name in reports."""
        return f"{self.variant.label}, seed {self.seed}"

    @property
    def identity(self) -> str:
        """Hex digest of everything that changes the result."""
        options = {k: v for k, v in self.variant.options.items() if k not in IGNORED_OPTIONS}
        return digest({"shared": self.shared, "options": options, "seed": self.seed})

    @property
    def folder_name(self) -> str:
        """Name of the run's folder."""
        return f"{self.variant.name}-seed{self.seed}-{self.identity[:8]}"

    def train_arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of `train` without the output, those that are no fields and the fields of the option classes.

        Of the options that all methods share, a method gets those that it reads.
        """
        own = self.variant.options
        reads = METHODS[own["method"]].reads
        shared = {"save_steps": SAVE_STEPS, **self.study.train}
        every = {k: v for k, v in shared.items() if k in reads} | own | {"seed": self.seed}
        return {k: every.pop(k) for k in ARGUMENTS if k in every}, every

    def to_json(self) -> dict[str, Any]:
        """Values of JSON from which `from_json` makes the run."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StudyRun:
        """Run of the values of `to_json`."""
        return cls(**{**values, "study": Study(**values["study"]), "variant": Variant(**values["variant"])})


def digest(value: Any) -> str:
    """Hex digest of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf8", "surrogatepass")).hexdigest()


def base_digest(model: str) -> str:
    """Hex digest of the files of a local base, or the hub id of another one."""
    path = Path(model)
    if not path.exists():
        return model
    files = sorted({f for pattern in FILES for f in path.glob(pattern)}) if path.is_dir() else [path]
    found = {}
    for file in files:
        with file.open("rb") as f:
            found[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return digest(found)
