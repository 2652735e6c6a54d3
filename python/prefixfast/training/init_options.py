"""Options of the initial values of prefixes, and the checks of them that need no base model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from prefixfast.config import PrefixConfig
from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.groups import InitName, PrefixGroup
from prefixfast.training.inputs import TrainingRows
from prefixfast.training.method import METHODS

logger = logging.getLogger(__name__)
DIFFERENT_PLACES = (
    "init: expected prefixes of one position, 'prefix' or 'infix'; train the others in a run of their own"
)


@dataclass(frozen=True)
class InitOptions:
    """Options of the initial values.

    Attributes:
        task: Task, whose ``init_text`` is the default text.
        init_text: Text of ``init="text"``, None for the task's.
        explicit: Names of the options that the caller gave.
        rows: Training rows by name, for a text of examples.
    """

    task: Task
    init_text: str | None
    explicit: frozenset[str]
    rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)


def adopt_init(group: PrefixGroup, options: InitOptions) -> PrefixGroup:
    """Check the initial values of a group, and take over the options of the prefixes among them.

    Args:
        group: Prefixes with the options of the caller.
        options: Options of the initial values.

    Returns:
        The group. Layers of the prefixes are taken when the base model is known.

    Raises:
        ConfigError: If initial values are unknown, or do not fit each other or the options.
    """
    jobs = group.jobs
    for job in jobs:
        if not isinstance(job.init, Prefix) and not (isinstance(job.init, str) and job.init in get_args(InitName)):
            msg = f"init: expected 'text', 'random', 'zero', a Prefix or a mapping of them, got {shown(job.init)}"
            raise ConfigError(msg)
    if options.init_text is not None and not any(job.init == "text" for job in jobs):
        got = f"init={shown(jobs[0].init)}" if isinstance(jobs[0].init, str) else "a prefix as init"
        msg = f"init_text: expected only with init='text', got {got}"
        raise ConfigError(msg)
    is_chosen = METHODS[group.method_config.method].position is not None
    explicit = options.explicit | ({"position"} if is_chosen else set())
    adopted = [
        replace(job, prefix_config=_adopted(job.prefix_config, job.init, explicit | job.own))
        if isinstance(job.init, Prefix)
        else job
        for job in jobs
    ]
    if len({job.prefix_config.position for job in adopted}) > 1:
        raise ConfigError(DIFFERENT_PLACES)
    frozen = {job.prefix_config.frozen_rows for job in adopted if isinstance(job.init, Prefix)} - {0}
    for count in sorted(frozen if "frozen_rows" not in explicit else ()):
        logger.info(
            "the first %d rows of the prefixes in init stay frozen (num_frozen_tokens); frozen_rows=0 trains them too",
            count,
        )
    return replace(group, jobs=tuple(adopted))


def with_enough_rows(groups: Sequence[PrefixGroup], rows: TrainingRows, *, isolate: bool) -> list[PrefixGroup]:
    """Groups that have the training examples of their text.

    Args:
        groups: Groups of a run.
        rows: Rows of the run, whose failures get those of names with too few rows.
        isolate: Whether the failure of a name is noted, instead of raised.

    Raises:
        ConfigError: If a name has too few rows and ``isolate`` is not set.
        DataError: If no name has enough rows.
    """
    kept: list[PrefixGroup] = []
    for group in groups:
        job, count = group.jobs[0], group.method_config.num_examples
        own = len(rows.rows[job.source])
        if group.method_config.method != "icl" or count <= own:
            kept.append(group)
            continue
        msg = f"num_examples: expected at most the {own} rows of {shown(job.source)}, got {count}"
        if not isolate:
            raise ConfigError(msg)
        rows.failed[job.name] = msg
    if not kept:
        name, text = next(iter(rows.failed.items()))
        msg = f"data: no prefix is left to train; of {shown(name)}: {text}"
        raise DataError(msg)
    return kept


def _adopted(config: PrefixConfig, first: Prefix, explicit: frozenset[str]) -> PrefixConfig:
    """Options with the lengths, sites, positions and frozen rows of a prefix; another explicit length is an error."""
    after = first.length_at("self")
    if first.pos_start not in (0, after):
        got = f"pos_start {first.pos_start} of {after} rows"
        msg = f"init: expected prefixes whose text starts at 0 or after the prefix, got {got}"
        raise ConfigError(msg)
    adopted: dict[str, Any] = {"prefix_length": first.length, "sites": first.sites}
    adopted |= {"pos_start": "after" if first.pos_start == after else "zero", "position": first.position}
    for name, value in adopted.items():
        if name in explicit and getattr(config, name) not in (value, None):
            got = f"{shown(value)}, got {shown(getattr(config, name))}"
            msg = f"{name}: the prefix in init has {got}; leave it out, or choose other initial values"
            raise ConfigError(msg)
    if "frozen_rows" not in explicit and (frozen := first.training.get("num_frozen_tokens", 0)):
        adopted["frozen_rows"] = frozen
    return PrefixConfig.make(config, **adopted)
