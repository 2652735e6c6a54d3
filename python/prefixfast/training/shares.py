"""How the processes of a run divide the work: each trains prefixes of its own, or a part of the rows of each step."""

from __future__ import annotations

import hashlib
import heapq
import logging
from dataclasses import replace

from prefixfast.errors import ConfigError
from prefixfast.training.callbacks import CallbackList
from prefixfast.training.defaults import num_steps
from prefixfast.training.groups import PrefixJob
from prefixfast.training.job import TrainJob
from prefixfast.training.ranks import Ranks

logger = logging.getLogger(__name__)


def divide(job: TrainJob, ranks: Ranks, *, into_store_alone: bool) -> TrainJob:
    """The job with the processes that divide its prefixes, or the rows of each step.

    Args:
        job: Training job.
        ranks: Processes of the run.
        into_store_alone: Whether a store gets the prefixes and there is no output folder.

    Raises:
        ConfigError: If one process alone is to hold a part of the base model.
    """
    is_sharded = job.config.shard_base
    if ranks.size == 1 and is_sharded:
        msg = "shard_base: expected several processes, started by torchrun or accelerate launch, got one"
        raise ConfigError(msg)
    if ranks.size == 1:
        return job
    ranks.is_in_step = is_sharded
    count = sum(len(group.jobs) for group in job.groups)
    if into_store_alone and count >= ranks.size and not is_sharded:
        logger.info("%d processes divide %d prefixes and exchange nothing in a step", ranks.size, count)
        return replace(job, team=ranks)
    can_divide = count >= ranks.size and not is_sharded
    advice = "; with a store and no output_dir they would divide the prefixes" if can_divide else ""
    logger.info("%d processes divide the rows of each step%s", ranks.size, advice)
    # A callback that runs a divided base model does so on all processes together.
    callbacks = job.callbacks if ranks.is_first or is_sharded else CallbackList(())
    return replace(job, ranks=ranks, callbacks=callbacks)


def own_part(job: TrainJob) -> TrainJob:
    """The job with the prefixes of this process, if processes divide them.

    Args:
        job: Training job with the prefixes of all processes.
    """
    team = job.team
    if team.size == 1:
        return job
    jobs = [j for group in job.groups for j in group.jobs]
    about = [(j.name, j.config, j.prefix_config, len(job.rows.rows[j.source])) for j in jobs]
    team.check_same(hashlib.sha256(repr(about).encode()).hexdigest(), "data and options")
    mine = _names_of(job, jobs, team)
    groups = [replace(g, jobs=tuple(j for j in g.jobs if j.name in mine)) for g in job.groups]
    rows = replace(job.rows, failed=job.rows.failed if team.is_first else {})
    return replace(job, groups=[group for group in groups if group.jobs], rows=rows)


def _names_of(job: TrainJob, jobs: list[PrefixJob], team: Ranks) -> set[str]:
    """Names of this process. The largest prefixes are given first, each to the process with the least work."""
    cost = {j.name: _cost(j, len(job.rows.rows[j.source])) for j in jobs}
    loads = [(0, rank) for rank in range(team.size)]
    mine = set()
    for name in sorted(cost, key=lambda n: -cost[n]):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost[name], rank))
        if rank == team.rank:
            mine.add(name)
    return mine


def _cost(job: PrefixJob, num_rows: int) -> int:
    """Number of rows of all steps of a prefix, at least 1."""
    batch = min(job.config.batch_size, num_rows)
    return max(1, num_steps(job.config, -(-num_rows // job.config.batch_size)) * batch)
