"""`GroupData`, a group of prefixes with its tokenized rows, and the identity of the training of each prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from prefixfast.config import PrefixConfig
from prefixfast.data.rows import Row
from prefixfast.errors import ConfigError, DataError
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import own_layers
from prefixfast.training.dataset import Dataset, NamedRows, build_dataset
from prefixfast.training.defaults import with_learning_rates
from prefixfast.training.examples import TOO_LONG, TokenizeOptions
from prefixfast.training.groups import PrefixGroup, PrefixJob
from prefixfast.training.identity import prefix_identities, run_identity
from prefixfast.training.init import resolve_group, text_ids
from prefixfast.training.job import TrainJob
from prefixfast.training.method import METHODS
from prefixfast.training.text_limits import text_limits


@dataclass(frozen=True)
class GroupData:
    """A group of prefixes with its rows.

    Attributes:
        model: Base model.
        job: Training job.
        group: Group with resolved options, without the prefixes whose rows are wrong.
        dataset: Tokenized training rows.
        eval_dataset: Tokenized held-out rows, None without held-out rows.
        failed: Error message of each prefix whose rows are wrong. A group without another name has no jobs and no rows.
    """

    model: Model
    job: TrainJob
    group: PrefixGroup
    dataset: Dataset
    eval_dataset: Dataset | None
    failed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Identity of the training of the group."""
        return run_identity(self.model, self.job, self.group, self.dataset, self.eval_dataset)

    @cached_property
    def identities(self) -> dict[str, str]:
        """Identity of the training of each prefix, in hex digits."""
        return prefix_identities(self.identity)

    @property
    def rows_per_example(self) -> float:
        """Mean number of rows of an example, less than 1 if rows have several references."""
        counts = [self.dataset.counts[job.name] for job in self.group.jobs]
        return sum(c["rows"] for c in counts) / sum(c["examples"] for c in counts)

    def only(self, names: list[str]) -> GroupData:
        """Some prefixes of the group, with the same tokenized rows.

        Args:
            names: Names of the prefixes, in the order of the result.
        """
        by_name = {j.name: j for j in self.group.jobs}
        return replace(self, group=replace(self.group, jobs=tuple(by_name[n] for n in names)), failed={})


def tokenize_group(model: Model, job: TrainJob, number: int) -> GroupData:
    """Tokenize the rows of a group.

    Args:
        model: Base model.
        job: Training job.
        number: Number of the group in the job.

    Raises:
        ConfigError: If options do not fit the base model.
        DataError: If rows are malformed and failures are not isolated, or no prefix is left.
        BaseMismatchError: If a given prefix was made for another base model.
    """
    group, failed = job.groups[number], dict[str, str]()
    method = METHODS[group.method_config.method]
    group = resolve_group(model, group, job.init_options)
    try:
        if not method.is_trained:
            length = len(text_ids(model, group, job.init_options))
            group = _with_length(group, length)
        depths = {j.prefix_config: depth(model, j.prefix_config) for j in group.jobs}
        group = with_learning_rates(group, depths)
        dataset, eval_dataset = _tokenize(model, job, group, failed)
    except DataError as e:
        if not (job.isolate and (method.is_alone or job.team.size > 1)):
            raise
        own = {j.name: failed.get(j.name, str(e)) for j in group.jobs}
        return GroupData(model, job, replace(group, jobs=()), Dataset.empty(), None, own)
    left = (eval_dataset or dataset).span
    jobs = tuple(j for j in group.jobs if j.name in left)
    return GroupData(model, job, replace(group, jobs=jobs), dataset, eval_dataset, failed)


def _with_length(group: PrefixGroup, length: int) -> PrefixGroup:
    """A group of one name whose prefix has the length of its text."""
    (alone,) = group.jobs
    config = PrefixConfig.make(alone.prefix_config, prefix_length=length)
    return replace(group, jobs=(replace(alone, prefix_config=config),))


def depth(model: Model, config: PrefixConfig) -> int:
    """Number of layers with prefixes that follow each other in the base model: those of its one or two stacks."""
    stacks = {
        "encoder" if site == "enc" else "decoder": own_layers(model.sites[site])
        for site in config.sites_of(model.sites)
    }
    return sum(map(len, stacks.values()))


def _tokenize(
    model: Model, job: TrainJob, group: PrefixGroup, failed: dict[str, str]
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out examples; the errors of rows go to ``failed`` by name if failures are isolated."""
    rows, makes_prefix = job.rows, METHODS[group.method_config.method].makes_prefix
    starts = {j.name: j.pos_start if makes_prefix else 0 for j in group.jobs}
    options = {start: _options(model, job, group, start) for start in dict.fromkeys(starts.values())}
    note = failed if job.isolate else None

    def named(rows_of: Mapping[str, Sequence[Row]], jobs: Iterable[PrefixJob]) -> dict[str, NamedRows]:
        return {j.name: NamedRows(j.source, rows_of[j.source], options[starts[j.name]]) for j in jobs}

    dataset = build_dataset(model, named(rows.rows, group.jobs), row_numbers=rows.row_numbers, failed=note)
    if rows.eval_rows is None:
        return dataset, None
    held_out = named(rows.eval_rows, (j for j in group.jobs if j.name in dataset.span))
    return dataset, build_dataset(model, held_out, row_numbers=rows.eval_row_numbers, failed=note)


def _options(model: Model, job: TrainJob, group: PrefixGroup, pos_start: int) -> TokenizeOptions:
    """Options of tokenization of the prefixes whose text starts at a position."""
    before, advice = job.on_top_of, METHODS[group.method_config.method].shorten
    starts = {"prefix": 0, "infix": 0} | {group.position: pos_start}
    if before is not None:
        starts[before.position] = max(starts[before.position], before.pos_start)
    start = sum(starts.values())
    room = model.max_positions - start
    if room < 1:
        msg = (
            f"rows start at position {start} behind the prefix, expected a position below {model.max_positions}, the "
            f"base model's number of positions; {advice}"
        )
        raise ConfigError(msg)
    limit = min(room, group.config.max_length or room)
    texts = text_limits(model, group.config, room, advice)
    has_infix = "infix" in (group.position, None if before is None else before.position)
    if limit == group.config.max_length:
        advice = TOO_LONG
    return TokenizeOptions(job.task, limit, group.config.overflow, has_infix=has_infix, advice=advice, texts=texts)
