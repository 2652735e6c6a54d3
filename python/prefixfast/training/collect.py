"""The result of a run, from the groups that this process has trained and those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.groups import PrefixJob
from prefixfast.training.job import TrainJob
from prefixfast.training.loop import GroupTrainer
from prefixfast.training.output_dir import OutputDir
from prefixfast.training.ranks import Ranks
from prefixfast.training.run_parts import RunPart, merge_parts
from prefixfast.training.saved_prefixes import SavedPrefixes
from prefixfast.training.train_run import RunTotals, TrainRun

if TYPE_CHECKING:
    from prefixfast.model.base import Model
    from prefixfast.store import PrefixStore


def collect(trainers: Sequence[GroupTrainer], job: TrainJob, output: OutputDir, base: Model) -> TrainRun:
    """Result of all groups, in the order of the data.

    Args:
        trainers: Groups that have ended.
        job: Training job.
        output: Output folder and store.
        base: Base model.
    """
    prefixes: dict[str, Any] = {n: p for trainer in trainers for n, p in trainer.prefixes.items()}
    prefixes |= {n: earlier.stored for n, earlier in output.unchanged.items()}
    metrics = {n: finished["metrics"] for trainer in trainers for n, finished in trainer.finished.items()}
    metrics |= {n: earlier.metrics for n, earlier in output.unchanged.items()}
    order = [j.name for j in _jobs(job) if j.name in prefixes]
    if not (output.log and "metrics" in output.log[-1]):
        output.write_log(metrics={n: metrics[n] for n in order})
    resumed = {*output.unchanged, *(name for trainer in trainers for name in trainer.resumed)}
    return TrainRun(
        prefixes=SavedPrefixes({n: prefixes[n] for n in order}),
        metrics={n: metrics[n] for n in order},
        log=output.log,
        failed=dict(job.rows.failed),
        variants=_variants(job),
        unchanged=tuple(n for n in order if n in resumed),
        totals=_totals(trainers, base),
    )


def join_runs(own: TrainRun, job: TrainJob, ranks: Ranks, store: PrefixStore) -> TrainRun:
    """Result of all processes of a run whose prefixes they have divided. The log is that of this process.

    Args:
        own: Result of this process.
        job: Training job with the prefixes of all processes.
        ranks: Processes of the run.
        store: Store that has the prefixes of all processes.

    Raises:
        DataError: If no process has trained a prefix.
    """
    parts = ranks.gather(RunPart.of(own))
    order = [j.name for j in _jobs(job)]
    return merge_parts(parts, store, order=order, log=own.log)


def _jobs(job: TrainJob) -> list[PrefixJob]:
    """Training of each prefix of a job, in the order of the data."""
    place = {name: i for i, name in enumerate(job.rows.rows)}
    return sorted((j for group in job.groups for j in group.jobs), key=lambda j: place[j.source])


def _variants(job: TrainJob) -> dict[str, dict[str, JSON | Prefix]]:
    """Options that a sweep varies by name."""
    return {j.name: {"of": j.source, **j.variant} for j in _jobs(job) if j.variant}


def _totals(trainers: Sequence[GroupTrainer], base: Model) -> RunTotals:
    from prefixfast.model.base import display_name

    return RunTotals(
        base=display_name(base),
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        examples=sum(t.num_taken for t in trainers),
        tokens=sum(t.num_tokens for t in trainers),
        seconds=sum(t.seconds for t in trainers),
    )
