"""What a run would take: parameters, memory, and the time of its steps, from two real ones. Nothing is written and nothing is kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prefixfast.data.rows import Rows
from prefixfast.training.loop import Run
from prefixfast.training.output_dir import Output
from prefixfast.training.resilience import recomputed
from prefixfast.training.trainer import base_for, check_groups, prepare


@dataclass(frozen=True)
class Estimate:
    """Of all groups of a run together.

    Attributes:
        prefixes: How many would be trained.
        failed: Names whose rows are wrong, with the error's text.
        examples: Of all prefixes.
        tokens: Of all examples, once.
        steps: Optimizer steps, those of different groups added.
        stored_numbers: Of one prefix as it is saved (the largest group's).
        trained_numbers: Adjusted for one prefix, the MLP included (the largest group's).
        base_bytes: Parameters of the base.
        training_bytes: Parameters, gradients and optimizer of the largest group.
        peak_bytes: Most memory that the measured steps took: allocated on a GPU, else of this process.
        seconds_per_step: Measured at the second step.
        seconds: Of all steps, evaluation not counted.
    """

    prefixes: int
    failed: dict[str, str]
    examples: int
    tokens: int
    steps: int
    stored_numbers: int
    trained_numbers: int
    base_bytes: int
    training_bytes: int
    peak_bytes: int
    seconds_per_step: float
    seconds: float


def estimate(model: Any, data: Rows | Mapping[str, Rows], **arguments: Any) -> Estimate:
    """Measure two steps of what `train` with the same arguments would do (``output_dir``, ``store``, ``resume`` and ``progress`` change nothing).

    Raises:
        ConfigError: As `train` does.
        DataError: As `train` does.
        CapacityError: As `train` does.
    """
    named = (
        "task",
        "prefix_column",
        "eval_data",
        "init",
        "init_text",
        "on_top_of",
        "sweep",
        "overrides",
        "store",
        "callbacks",
        "prefix_config",
        "config",
    )
    known: dict[str, Any] = {n: arguments.pop(n, () if n == "callbacks" else None) for n in named}
    on_error, objective = arguments.pop("on_error", "isolate"), arguments.pop("objective", "sft")
    for name in ("output_dir", "resume", "progress"):
        arguments.pop(name, None)
    job, chosen = prepare(data, **known, resume=False, objective=objective, on_error=on_error, fields=arguments)
    parts: list[tuple[Run, float]] = []
    with base_for(model, chosen) as base, recomputed(base, chosen.gradient_checkpointing):
        check_groups(base, job)
        for number in range(len(job.groups)):
            run = Run(base, job, number, Output(None, None, single=True))
            parts.append((run, _time_of_a_step(run)))
        base_bytes = sum(p.numel() * p.element_size() for p in base.hf.parameters())
        peak = torch.cuda.max_memory_allocated(base.device) if base.device.type == "cuda" else _resident()
    largest = max((run for run, _ in parts), key=lambda run: sum(t.numel() for t, _ in run.steps.params.params))
    params = largest.steps.params
    steps = [int(run.steps.total.max()) for run, _ in parts]
    return Estimate(
        prefixes=sum(len(run.names) for run, _ in parts),
        failed=dict(job.given.failed),
        examples=len(parts[0][0].steps.examples.targets),
        tokens=len(parts[0][0].steps.examples.ids),
        steps=sum(steps),
        stored_numbers=sum(t.numel() for t in params.current()) // params.num_prefixes,
        trained_numbers=params.num_trained,
        base_bytes=base_bytes,
        training_bytes=4 * sum(t.numel() * t.element_size() for t, _ in params.params),
        peak_bytes=peak,
        seconds_per_step=max(seconds for _, seconds in parts),
        seconds=sum(count * seconds for count, (_, seconds) in zip(steps, parts, strict=True)),
    )


def _time_of_a_step(run: Run) -> float:
    """Seconds of the second step; the first pays for what is made once."""
    for step in range(2):
        start = time.perf_counter()
        run.steps.take(min(step, int(run.steps.total.max()) - 1), run.active)
        if run.model.device.type == "cuda":
            torch.cuda.synchronize(run.model.device)
    return time.perf_counter() - start


def _resident() -> int:
    """Most memory that this process has taken; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
