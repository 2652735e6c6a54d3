"""The line that a run logs before its first step: its prefixes, examples and options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prefixfast.io.text import counted, span, whole
from prefixfast.model.base import compute_line
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.dataset import Dataset
from prefixfast.training.group_data import GroupData
from prefixfast.training.method import METHODS
from prefixfast.training.step import StepRunner

# Options that every start line shows, with the values that None and "auto" stand for.
SHOWN_OPTIONS = ("learning_rate", "lr_scheduler_type", "batch_size", "seed")


def settings_line(data: GroupData, runner: StepRunner, active: Sequence[int]) -> str:
    """Prefixes, examples and options of a group in one line.

    Args:
        data: Group with its rows.
        runner: Parameters and steps of the group.
        active: Numbers of the prefixes that are trained, at least one. An earlier run has finished the others.
    """
    method, params = METHODS[data.group.method_config.method], runner.params
    jobs, reads = [data.group.jobs[i] for i in active], method.reads
    each = "" if len(jobs) == 1 else " each"
    networks = _distinct("mlp" if job.uses_mlp else "none" for job in jobs)
    numbers = [params.num_trained(i) for i in active]
    rows = params.describe(active)
    what = f"{counted(len(jobs), 'prefix', 'prefixes')} of {rows}{each}" if method.makes_prefix else rows
    inits = _distinct("a prefix" if isinstance(j.init, Prefix) else j.init for j in jobs)
    options = (f"{n} {_distinct(getattr(j.config, n) for j in jobs)}" for n in SHOWN_OPTIONS)
    parts = [
        *_counts(data.dataset, [job.name for job in jobs]),
        *([f"init {inits}"] if "init" in reads else []),
        *([f"reparameterization {networks}"] if "reparameterization" in reads else []),
        f"{span(numbers)} {'number' if {*numbers} == {1} else 'numbers'}{each}",
        *options,
        compute_line(runner.model),
    ]
    steps = runner.total[active].tolist()
    if not any(steps):
        return f"making {what} without training: {', '.join([parts[0], parts[-1]])}"
    return f"training {what} for {_distinct(steps)} {'step' if set(steps) == {1} else 'steps'}: {', '.join(parts)}"


def _counts(dataset: Dataset, names: Iterable[str]) -> list[str]:
    """Numbers of the examples of some names and of the rows without one, each once where names share examples."""
    counts = {dataset.span[name]: dataset.counts[name] for name in names}
    count, sizes = sum(end - first for first, end in counts), dataset.examples.sizes
    longest = max(int(sizes[first:end].max()) for first, end in counts)
    left_out = ((sum(c[f"{what}_rows"] for c in counts.values()), what) for what in ("skipped", "truncated"))
    examples = f"{counted(count, 'example')} of at most {counted(longest, 'token')}"
    return [examples, *(f"{whole(number)} {what}" for number, what in left_out if number)]


def _distinct(values: Iterable[Any]) -> str:
    """One value, or the range or the list of several."""
    found = list(dict.fromkeys(values))
    if len(found) > 1 and all(isinstance(v, int | float) for v in found):
        return f"{min(found):g} to {max(found):g}"
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in found)
