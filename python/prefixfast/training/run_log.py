"""The line that a run logs before its first step: its prefixes, examples and options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prefixfast.io.text import counted, span
from prefixfast.model.base import compute_line
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.groups import PrefixGroup
from prefixfast.training.method import METHODS
from prefixfast.training.step import StepRunner

# Options that every start line shows, with the values that None and "auto" stand for.
SHOWN_OPTIONS = ("learning_rate", "lr_scheduler_type", "batch_size", "seed")


def settings_line(group: PrefixGroup, runner: StepRunner) -> str:
    """Prefixes, examples and options of a group in one line.

    Args:
        group: Group with resolved options.
        runner: Parameters, steps and examples of the group.
    """
    params, examples, jobs = runner.params, runner.examples, group.jobs
    reads = METHODS[group.method_config.method].reads
    each = "" if len(jobs) == 1 else " each"
    networks = _distinct("mlp" if job.uses_mlp else "none" for job in jobs)
    numbers = [params.num_trained(i) for i in range(len(jobs))]
    is_prefix = METHODS[group.method_config.method].makes_prefix
    prefixes = f"{counted(len(jobs), 'prefix', 'prefixes')} of {params.description}{each}"
    what = prefixes if is_prefix else params.description
    inits = _distinct("a prefix" if isinstance(j.init, Prefix) else j.init for j in jobs)
    options = (f"{n} {_distinct(getattr(j.config, n) for j in jobs)}" for n in SHOWN_OPTIONS)
    parts = [
        f"{counted(len(examples.num_targets), 'example')} of at most {counted(int(examples.sizes.max()), 'token')}",
        *(f"{n} skipped" for n in [examples.num_skipped] if n),
        *(f"{n} truncated" for n in [examples.num_truncated] if n),
        *([f"init {inits}"] if "init" in reads else []),
        *([f"reparameterization {networks}"] if "reparameterization" in reads else []),
        f"{span(numbers)} {'number' if {*numbers} == {1} else 'numbers'}{each}",
        *options,
        compute_line(runner.model),
    ]
    steps = runner.total.tolist()
    if not any(steps):
        return f"making {what} without training: {', '.join([parts[0], parts[-1]])}"
    return f"training {what} for {_distinct(steps)} {'step' if set(steps) == {1} else 'steps'}: {', '.join(parts)}"


def _distinct(values: Iterable[Any]) -> str:
    """One value, or the range or the list of several."""
    found = list(dict.fromkeys(values))
    if len(found) > 1 and all(isinstance(v, int | float) for v in found):
        return f"{min(found):g} to {max(found):g}"
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in found)
