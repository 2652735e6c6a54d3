"""`TrainJob`: what a call of `train` asks for, checked before torch is imported and any base model is loaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config import PrefixConfig, TrainConfig
from prefixfast.config.json_types import JSON
from prefixfast.data.builtin_tasks import find_task
from prefixfast.data.columns import task_of_columns
from prefixfast.data.join import sample_joins
from prefixfast.data.row_reader import RowReader
from prefixfast.data.rows import Rows
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError, check_choice, check_flag, shown
from prefixfast.prefix.compatibility import check_composition, check_fits
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore, open_store
from prefixfast.training.callbacks import Callback, CallbackList
from prefixfast.training.groups import Init, Overrides, PrefixGroup, Sweep, make_groups
from prefixfast.training.held_out import hold_out
from prefixfast.training.init_options import InitOptions, adopt_init, with_enough_rows
from prefixfast.training.inputs import ReadOptions, TrainingRows, check_formats, check_task_rows, read_training_rows
from prefixfast.training.lora_config import read_lora_config
from prefixfast.training.method import METHODS, check_read
from prefixfast.training.ranks import ALONE, Ranks
from prefixfast.training.settings import BaseKind, GivenOptions, TrainSettings, resolve_settings

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from prefixfast.model.base import Model


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobArguments:
    """Arguments of `train` that say what is trained, with the meaning that they have there."""

    data: Rows | Mapping[str, Rows]
    task: str | Task | Mapping[str, JSON] | None = None
    prompt: str | None = None
    target: str | None = None
    table: Sequence[str] | None = None
    prefix_column: str | None = None
    encoding: str | None = None
    split: str | None = None
    eval_data: Rows | Mapping[str, Rows] | None = None
    init: Init | None = None
    init_text: str | None = None
    on_top_of: Prefix | str | None = None
    lora: LoraConfig | None = None
    objective: str = "sft"
    sweep: Sweep | None = None
    overrides: Overrides | None = None
    store: PrefixStore | str | Path | None = None
    resume: bool = False
    on_error: str = "isolate"
    callbacks: Sequence[Callback] = ()
    prefix_config: PrefixConfig | Mapping[str, JSON] | None = None
    config: TrainConfig | Mapping[str, JSON] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainJob:
    """A checked call of `train`.

    Attributes:
        rows: Rows of the run.
        task: Task of the rows.
        config: Options of training that all groups share.
        groups: Prefixes, grouped by the options that a batch must share.
        init_text: Text of ``init="text"``, None for the task's.
        explicit: Names of the options that the caller gave.
        on_top_of: Frozen prefix before every trained one, None for none.
        lora: Fields of a configuration of PEFT, None for the options of the method.
        isolate: Whether the failure of one prefix is noted instead of raised.
        callbacks: Callbacks of the run.
        resume: Whether the run continues from a checkpoint, if there is one.
        arguments: Arguments of the call.
        given: Options that the caller gave.
        ranks: Processes that divide the examples of each step.
        team: Processes that divide the prefixes.
    """

    rows: TrainingRows
    task: Task
    config: TrainConfig
    groups: list[PrefixGroup]
    init_text: str | None
    explicit: frozenset[str]
    on_top_of: Prefix | None
    lora: Mapping[str, JSON] | None
    isolate: bool
    callbacks: CallbackList
    resume: bool
    arguments: JobArguments
    given: GivenOptions
    ranks: Ranks = ALONE
    team: Ranks = ALONE

    @property
    def makes_weights(self) -> bool:
        """Whether a group trains weights that act in the base model itself."""
        return any(METHODS[group.method_config.method].makes_weights for group in self.groups)

    @property
    def init_options(self) -> InitOptions:
        """Options of the initial values."""
        return InitOptions(self.task, self.init_text, self.explicit, self.rows.rows)

    def for_model(self, model: Model) -> TrainJob:
        """The job with the recipe's options for the kind of a base model, checked before the first group is trained.

        Args:
            model: Base model.

        Raises:
            ConfigError: If options do not fit the base model.
            BaseMismatchError: If a given prefix was made for another base model.
        """
        job = self
        if model.seq2seq is not None:
            job = self.for_kind(BaseKind(True, not model.seq2seq.has_distances))
        elif warning := sample_joins(self.task, self.rows.rows.values()).warning():  # they follow each other in a text
            logger.warning("%s", warning)
        job._check_model(model)
        return job

    def for_kind(self, kind: BaseKind) -> TrainJob:
        """The job with the recipe's options for a kind of base model.

        Args:
            kind: Kind of the base model.

        Raises:
            ConfigError: If options do not fit each other.
        """
        settings = resolve_settings(self.given, self.task.name, kind)
        groups, explicit = _groups(self.arguments, settings, self.rows, self.task)
        return replace(self, config=settings.config, groups=groups, init_text=settings.init_text, explicit=explicit)

    def _check_model(self, model: Model) -> None:
        from prefixfast.training.init import resolve_group
        from prefixfast.training.text_limits import check_lengths

        for group in self.groups:
            check_lengths(model, group.config, self.explicit)
            position = resolve_group(model, group, self.init_options).position
            if self.on_top_of is not None:
                check_composition(model, (position, self.on_top_of.position))
        if self.on_top_of is not None:
            check_fits(model, self.on_top_of, "on_top_of")


def prepare(arguments: JobArguments) -> TrainJob:
    """Check everything that needs no base model, and read the rows.

    Raises:
        ConfigError: If options are unknown, wrong, or do not fit each other.
        DataError: If rows cannot be read and are not isolated.
    """
    a = arguments
    if not isinstance(a.objective, str) or a.objective != "sft":
        got = shown(a.objective)
        msg = f"objective: expected 'sft' (the likelihood of the targets; there is no other yet), got {got}"
        raise ConfigError(msg)
    check_choice("on_error", a.on_error, ("isolate", "raise"))
    check_flag("resume", a.resume)
    callbacks = CallbackList(a.callbacks)
    lora, fields = read_lora_config(a.lora, a.fields, a.sweep)
    given = GivenOptions(a.config, a.prefix_config, fields, a.init, a.init_text)
    settings = resolve_settings(given, "")  # report wrong options before the rows are read
    method = settings.method_config.method
    check_read(method, [n for n in ("on_top_of", "store", "lora") if getattr(a, n) is not None])
    check_read(method, a.sweep if isinstance(a.sweep, Mapping) else (), "sweep")
    given_task = task_of_columns(a.task, prompt=a.prompt, target=a.target, table=a.table)
    keeps = isinstance(given_task, Task) and given_task.format == "columns"  # which reads the columns that it names
    reader = RowReader(a.encoding, a.split, given_task)
    options = ReadOptions(a.prefix_column, a.on_error == "isolate", keeps, reader)
    rows = read_training_rows(a.data, a.eval_data, options)
    task = _find_task(rows, given_task)
    check_task_rows(rows, task)
    rows = check_formats(rows, task, isolate=options.isolate and not rows.is_single)
    settings = resolve_settings(given, task.name)
    if fraction := settings.config.eval_fraction:
        if a.eval_data is not None:
            msg = "eval_fraction and eval_data: expected one of them, got both"
            raise ConfigError(msg)
        rows = hold_out(rows, task, fraction, settings.config.seed, isolate=options.isolate)
    groups, explicit = _groups(a, settings, rows, task)
    return TrainJob(
        rows,
        task,
        settings.config,
        groups,
        settings.init_text,
        explicit,
        _find_frozen_prefix(a.on_top_of, a.store),
        lora,
        a.on_error == "isolate" and not rows.is_single,
        callbacks,
        a.resume,
        a,
        given,
    )


def _groups(
    a: JobArguments, settings: TrainSettings, rows: TrainingRows, task: Task
) -> tuple[list[PrefixGroup], frozenset[str]]:
    """Groups of a call, and the names of the options that the caller gave."""
    groups = make_groups(
        rows.rows, settings, overrides=a.overrides, sweep=a.sweep, is_single=rows.is_single, failed=rows.failed
    )
    explicit = settings.explicit | {*(a.sweep or ())}
    init_options = InitOptions(task, settings.init_text, explicit)
    groups = [adopt_init(group, init_options) for group in groups]
    groups = with_enough_rows(groups, rows, isolate=a.on_error == "isolate" and not rows.is_single)
    configs = [job.config for group in groups for job in group.jobs]
    if rows.eval_rows is None and any(
        c.metric_for_best_model == "eval_loss" or c.early_stopping_patience for c in configs
    ):
        names = "early_stopping_patience and metric_for_best_model='eval_loss'"
        msg = f"{names}: expected eval_data or eval_fraction beside them"
        raise ConfigError(msg)
    return groups, explicit


@contextlib.contextmanager
def load_base(model: str | Path | PreTrainedModel | PeftModel | Model, config: TrainConfig) -> Iterator[Model]:
    """Base model in the requested dtype for the time of a run.

    Args:
        model: Base model, as `load` takes it.
        config: Options of training, of which ``dtype`` and ``shard_base`` are used.

    Raises:
        ConfigError: If the model is unsupported, or is loaded already in another dtype.
    """
    from prefixfast.model.base import DTYPES
    from prefixfast.model.process import model_lock
    from prefixfast.model.shared_base import borrowed

    how = {"dtype": config.dtype} if isinstance(model, str | Path) else {}
    if config.shard_base:
        if not isinstance(model, str | Path):
            got = type(model).__name__
            msg = f"shard_base: expected a base model by name, which is loaded for this run alone, got {got}"
            raise ConfigError(msg)
        from prefixfast.model.sharded_base import sharded_base

        loaded = sharded_base(model, config.dtype)
    else:
        loaded = borrowed(model, **how)
    with model_lock(), loaded as base:
        if config.dtype != "auto" and base.dtype != DTYPES[config.dtype]:
            advice = "load it so, or leave dtype out"
            msg = f"dtype: the given model computes in {base.dtype}, got {shown(config.dtype)}; {advice}"
            raise ConfigError(msg)
        yield base


def _find_task(rows: TrainingRows, task: str | Task | Mapping[str, JSON] | None) -> Task:
    """The given task, or the task of the first prefix whose rows have the keys of one."""
    by_prefix = list(rows.rows.values())
    for i, own in enumerate(by_prefix):
        if task is None and "input_ids" in own[0]:
            return Task("input_ids")
        try:
            return find_task(task, own[0])
        except DataError:
            if i + 1 == len(by_prefix):
                raise
    raise AssertionError


def _find_frozen_prefix(on_top_of: Any, store: PrefixStore | str | Path | None) -> Prefix | None:
    if isinstance(on_top_of, str):
        opened = open_store(store, read_only=True)
        if opened is None:
            msg = f"on_top_of: expected a Prefix, or a store beside the name {shown(on_top_of)}"
            raise ConfigError(msg)
        return opened[on_top_of]
    if on_top_of is not None and not isinstance(on_top_of, Prefix):
        msg = f"on_top_of: expected a Prefix or a name in the store, got {type(on_top_of).__name__}"
        raise ConfigError(msg)
    return on_top_of
