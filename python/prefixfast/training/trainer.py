"""`train`: one prefix or many on a frozen base model, all of them in the same packed batches."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from prefixfast.config import PrefixConfig, TrainConfig, TrainFields
from prefixfast.config.fields import MethodName, PrefixMethod, WeightsMethod
from prefixfast.config.json_types import JSON
from prefixfast.data.rows import Rows
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, check_flag, shown
from prefixfast.io.paths import as_path
from prefixfast.io.progress import show_progress
from prefixfast.model.base_name import check_base_name
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import PrefixStore, open_store
from prefixfast.store.runs import drop_finished
from prefixfast.training.arguments import BaseModel, TrainArguments
from prefixfast.training.callbacks import Callback
from prefixfast.training.groups import Init, Overrides, Sweep
from prefixfast.training.inputs import SINGLE_NAME
from prefixfast.training.job import JobArguments, TrainJob, load_base, prepare
from prefixfast.training.output_check import check_output_folder
from prefixfast.training.output_dir import OutputDir
from prefixfast.training.ranks import join_ranks, rank_and_size
from prefixfast.training.reporters import make_reporter
from prefixfast.training.result_log import log_result
from prefixfast.training.saved_prefixes import EarlierPrefix
from prefixfast.training.shares import divide, own_part
from prefixfast.training.store_output import StoreOutput
from prefixfast.training.train_run import TrainRun

if TYPE_CHECKING:
    from peft import LoraConfig

    from prefixfast.training.group_data import GroupData

__all__ = ["TrainRun", "train"]


@overload
def train(
    model: BaseModel,
    data: Mapping[str, Rows],
    *,
    prefix_column: None = None,
    sweep: Sweep | None = None,
    method: MethodName = "prefix",
    lora: LoraConfig | None = None,
    **arguments: Unpack[TrainArguments],
) -> TrainRun: ...


@overload
def train(
    model: BaseModel,
    data: Rows,
    *,
    prefix_column: str,
    sweep: Sweep | None = None,
    method: MethodName = "prefix",
    lora: LoraConfig | None = None,
    **arguments: Unpack[TrainArguments],
) -> TrainRun: ...


@overload
def train(
    model: BaseModel,
    data: Rows,
    *,
    prefix_column: None = None,
    sweep: Sweep,
    method: MethodName = "prefix",
    lora: LoraConfig | None = None,
    **arguments: Unpack[TrainArguments],
) -> TrainRun: ...


@overload
def train(
    model: BaseModel,
    data: Rows,
    *,
    prefix_column: None = None,
    sweep: None = None,
    method: PrefixMethod = "prefix",
    lora: None = None,
    **arguments: Unpack[TrainArguments],
) -> Prefix: ...


@overload
def train(
    model: BaseModel,
    data: Rows,
    *,
    prefix_column: None = None,
    sweep: None = None,
    method: WeightsMethod,
    lora: LoraConfig | None = None,
    **arguments: Unpack[TrainArguments],
) -> TunedWeights: ...


@overload
def train(
    model: BaseModel,
    data: Rows,
    *,
    prefix_column: None = None,
    sweep: None = None,
    lora: LoraConfig,
    **arguments: Unpack[TrainArguments],
) -> TunedWeights: ...


@overload
def train(
    model: BaseModel,
    data: Rows,
    *,
    prefix_column: None = None,
    sweep: None = None,
    method: MethodName,
    lora: LoraConfig | None = None,
    **arguments: Unpack[TrainArguments],
) -> Prefix | TunedWeights: ...


def train(
    model: BaseModel,
    data: Rows | Mapping[str, Rows],
    *,
    task: str | Task | Mapping[str, JSON] | None = None,
    prompt: str | None = None,
    target: str | None = None,
    table: Sequence[str] | None = None,
    prefix_column: str | None = None,
    encoding: str | None = None,
    split: Literal["train", "dev", "test"] | None = None,
    eval_data: Rows | Mapping[str, Rows] | None = None,
    init: Init | None = None,
    init_text: str | None = None,
    on_top_of: Prefix | str | None = None,
    lora: LoraConfig | None = None,
    objective: Literal["sft"] = "sft",
    sweep: Sweep | None = None,
    overrides: Overrides | None = None,
    store: PrefixStore | str | Path | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_error: Literal["isolate", "raise"] = "isolate",
    callbacks: Sequence[Callback] = (),
    prefix_config: PrefixConfig | Mapping[str, JSON] | None = None,
    config: TrainConfig | Mapping[str, JSON] | None = None,
    progress: bool | None = None,
    **fields: Unpack[TrainFields],
) -> Prefix | TunedWeights | TrainRun:
    """Train one prefix, or many prefixes in the same batches, on a frozen base model.

    Plain rows train one prefix. A mapping of names to rows, or rows with a ``prefix_column``, trains one prefix for
    each name. The prefixes share the forward and backward passes of the base model. Up to rounding each gets the
    result that it has when it is trained alone. The weights of the base model do not change.

    Processes that ``torchrun`` or ``accelerate launch`` has started make the same call, divide the work and return the
    same result.

    Args:
        model: Base model: hub id, folder, Hugging Face model (attached during the run and then restored) or `Model`.
        data: Training rows: a file (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet``, also ``.gz``), an iterable
            of mappings, or a mapping of names to rows, such as a `Folder` of files.
        task: Task that turns rows into prompts and targets: name of a built-in task (``"e2e"``, ``"webnlg"``,
            ``"dart"``, ``"table"``, ``"summary"``, ``"xsum"``, ``"cnn_dailymail"``, ``"samsum"``,
            ``"dialogsum"``, ``"prompt"``, ``"messages"``, ``"text"``, ``"instruction"``) or `Task`.
            None chooses the task by the keys of the rows.
        prompt: Template of the prompt for rows with columns of your own, for example ``"{name}, {price} ->"``. With
            ``target`` it takes the place of ``task``; `prefixfast.data.column_task` describes both.
        target: Column of the target, or a template of columns.
        table: Columns that are written as a table, in the place of ``prompt``.
        prefix_column: Key of plain rows whose value names the prefix that is trained on the row.
        encoding: Encoding of text files, for example ``"cp1252"``. None takes the encoding of a file's byte order mark,
            or UTF-8 without one.
        split: Split, ``"train"``, ``"dev"`` or ``"test"``, that the official files in ``data`` hold. They are then read
            as by `prefixfast.data.read_task`, and those in ``eval_data`` as the split ``"dev"``. None reads files of
            rows.
        eval_data: Held-out rows, for all prefixes or by name like ``data``. They are used for the choice of the best
            state, early stopping and `TrainRun.best`.
        init: Initial values: ``"text"`` (keys and values of a text in the base model), ``"random"``, ``"zero"``, a
            `Prefix`, or a `Prefix` for each name. None takes those of the recipe, by default ``"text"``.
        init_text: Text of ``init="text"``; None takes the task's.
        on_top_of: Frozen prefix that comes before each trained prefix, as in ``generate(..., [[it, new]])``: a
            `Prefix`, or its name in ``store``.
        lora: Configuration of PEFT for LoRA layers that are trained with the prefix, or of method ``"lora"`` alone. It
            takes the place of ``lora_rank`` and ``lora_alpha``, and the method is ``"prefix+lora"`` by default.
        objective: Training objective. ``"sft"``, the only one, is the likelihood of the target, as in Li & Liang.
        sweep: Values to try by option, or initial values for ``"init"``. Every combination is trained as a prefix of
            its own. Combinations share batches where only options of `prefixfast.training.groups.PER_PREFIX` differ.
        overrides: Options of single prefixes by name, for example ``{"ann": {"learning_rate": 1e-3}}``; options of
            `prefixfast.training.groups.PER_PREFIX` are possible.
        store: `PrefixStore`, or its path, that gets each prefix when the prefix is finished. The prefix of plain rows
            gets the name ``"prefix"``. Without ``output_dir`` the store also holds ``log.jsonl``, ``failed.jsonl`` and
            checkpoints of the run, in a folder of its own under ``.prefixfast-runs``.
        output_dir: Folder for the prefixes (the prefix itself, or one folder for each name), ``log.jsonl``,
            ``failed.jsonl`` and checkpoints. A folder with results of an earlier run is refused, unless ``resume`` or
            ``overwrite`` is set. None writes no files but those of ``store``.
        resume: Whether the run continues from the checkpoint in ``output_dir``, if there is one. On CPUs with the
            same instruction set and number of threads the result is bit-identical to that of an uninterrupted run.
            Without ``output_dir`` it continues from checkpoints in ``store``, and does not train a prefix that the
            store already holds as its newest version of the same base model, rows and options.
        overwrite: Whether the results of an earlier run in ``output_dir`` are replaced. Its log and checkpoints are
            removed before the first step, and each of its prefixes is replaced when the new prefix of the same name is
            saved. Prefixes of other names and files of other programs stay.
        on_error: Treatment of a prefix that fails because of its rows or its numbers, or cannot be saved, if several
            are trained. ``"isolate"`` reports the failure in `TrainRun.failed` and trains the others. ``"raise"``
            raises the error.
        callbacks: Callbacks, objects with some of the hooks of `prefixfast.training.callbacks.Callback`.
        prefix_config: Options of what is learned, a `PrefixConfig` or a mapping.
        config: Options of how it is learned, a `TrainConfig` or a mapping.
        progress: Whether to report progress. None shows a bar on a terminal or in a notebook, and elsewhere a line
            every 10 s. True shows the bar everywhere.
        fields: Fields of `MethodConfig`, `TrainConfig` and `PrefixConfig`, which take precedence over ``config`` and
            ``prefix_config``.

    Returns:
        A `Prefix` for plain rows without a sweep; a `TrainRun`, a mapping of names to prefixes, otherwise. The methods
        ``"full"``, ``"top2"``, ``"adapter"``, ``"lora"`` and ``"prefix+lora"`` give `TunedWeights` in the place of each
        `Prefix`.

    Raises:
        ConfigError: If options do not fit each other or the base model, the checkpoint belongs to another run, or
            ``output_dir`` holds an earlier run or cannot hold the prefixes.
        DataError: If rows are malformed and the failure is not isolated.
        BaseMismatchError: If a given prefix was made for another base model.
        CapacityError: If memory runs out on a single example.
        KeyboardInterrupt: If the user interrupts; with ``output_dir`` a checkpoint is written first.

    Example:
        >>> rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+4=", "completion": "7"}]
        >>> prefix = train(base, rows, prefix_length=4, max_steps=2)
        >>> prefix.length, prefix.training["metrics"]["steps"]
        (4, 2.0)

        One prefix for each user; the rows of ``eve`` are malformed, which does not stop the others:

        >>> data = {"ann": rows, "bob": rows[:1], "eve": [{}]}
        >>> users = train(base, data, task="prompt", max_steps=2, output_dir="users", resume=True)
        >>> list(users), list(users.failed), users.metrics["bob"]["examples"]
        (['ann', 'bob'], ['eve'], 1.0)

    Source:
        Li & Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation (arXiv:2101.00190).
    """
    given: dict[str, Any] = dict(locals())
    arguments = JobArguments(**{f.name: given[f.name] for f in dataclasses.fields(JobArguments)})
    if progress is not None:
        check_flag("progress", progress)
    check_flag("overwrite", overwrite)
    with show_progress(progress if rank_and_size()[0] == 0 else False):
        job = prepare(arguments)
        is_single = job.rows.is_single and sweep is None
        folder = None if output_dir is None else as_path("output_dir", output_dir)
        if isinstance(model, str | Path):
            check_base_name(model)
        ranks = join_ranks()
        with ranks.together():
            ranks.first(lambda: _check_output(job, folder, store, is_single=is_single, overwrite=overwrite))
            work = divide(job, ranks, into_store_alone=store is not None and folder is None)
            output = _open_output(work, folder, store, is_single=is_single)
            result = _run(model, work, output)
    return result.prefixes[SINGLE_NAME] if is_single else result


def _check_output(job: TrainJob, folder: Path | None, store: object, *, is_single: bool, overwrite: bool) -> None:
    """Check the output of a job before the base model is loaded and a folder is made."""
    if job.resume and overwrite:
        msg = "resume and overwrite: expected one of them, got both"
        raise ConfigError(msg)
    if job.resume and folder is None and store is None:
        msg = "resume: expected output_dir or store beside it, with the files of an earlier run"
        raise ConfigError(msg)
    if overwrite and folder is None:
        msg = "overwrite: expected output_dir beside it; a store keeps an earlier prefix as a version"
        raise ConfigError(msg)
    if isinstance(store, PrefixStore) and store.read_only:
        msg = f"store: expected one that can be written, got {shown(str(store.path))}, which was opened read-only"
        raise ConfigError(msg)
    if folder is not None:
        check_output_folder(folder, _names(job), is_single=is_single, resume=job.resume, overwrite=overwrite)


def _open_output(job: TrainJob, folder: Path | None, store: object, *, is_single: bool) -> OutputDir:
    """Output of a job, whose store is made if it does not exist. Processes of one batch write the same files once."""
    if not job.ranks.is_first:
        return OutputDir(None, None, _names(job), is_single=is_single)
    opened = open_store(store, read_only=False)
    if folder is None and opened is not None:
        return StoreOutput(opened, _names(job))
    return OutputDir(folder, opened, _names(job), is_single=is_single)


def _names(job: TrainJob) -> list[str]:
    return [*dict.fromkeys([*(j.name for group in job.groups for j in group.jobs), *job.rows.failed])]


def _parts(data: GroupData, output: OutputDir, job: TrainJob) -> list[GroupData]:
    """Groups that are trained in place of a group, which the first of several processes reads from the files."""

    def read() -> tuple[list[list[str]], dict[str, EarlierPrefix]]:
        parts = output.parts(data, resume=job.resume)
        return [[j.name for j in part.group.jobs] for part in parts], output.unchanged

    if job.ranks.size == 1:
        return output.parts(data, resume=job.resume)
    names, output.unchanged = job.ranks.first(read)
    return [data.only(own) for own in names]


def _run(model: BaseModel, job: TrainJob, output: OutputDir) -> TrainRun:
    """Train all groups of a job. Its modules import torch, which a refused call needs not wait for."""
    from prefixfast.model.kept_memory import keep_freed_memory
    from prefixfast.model.memory import reset_peak_memory
    from prefixfast.training.collect import collect, join_runs
    from prefixfast.training.dataset import none_left
    from prefixfast.training.group_data import tokenize_group
    from prefixfast.training.loop import GroupTrainer, note_failure
    from prefixfast.training.resilience import gradient_checkpointing

    folder = output.folder
    if job.config.report_to != "none" and job.ranks.is_first:
        reporter = make_reporter(job.config.report_to, None if folder is None else str(folder))
        job.callbacks.callbacks.append(reporter)
    trainers: list[GroupTrainer] = []
    try:
        with (
            load_base(model, job.config) as base,
            base.guard.training() if job.makes_weights else contextlib.nullcontext(),
            gradient_checkpointing(base, job.config.gradient_checkpointing),
            keep_freed_memory(),
        ):
            whole = job.for_model(base)
            job = own_part(whole)
            output.names = _names(job)
            reset_peak_memory(base.device)
            for number in range(len(job.groups)):
                data = tokenize_group(base, job, number)
                if job.ranks.size > 1:
                    job.ranks.check_same(repr(data.identities), "data and options")
                for name, error in data.failed.items():
                    note_failure(job, output, name, error)
                for part in _parts(data, output, job) if data.group.jobs else ():
                    trainer = GroupTrainer(part, len(trainers), output)
                    if not trainers:  # the first group is checked completely before earlier files are removed
                        output.open(resume=job.resume)
                        output.write_failed(job.rows.failed)
                    trainer.run()
                    trainer.free()
                    trainers.append(trainer)
            if not trainers and not output.unchanged and job.team.size == 1:
                raise none_left(job.rows.failed)
            if not trainers and job.rows.failed:
                output.open(resume=job.resume)
                output.write_failed(job.rows.failed)
            result = collect(trainers, job, output, base)
        output.end(list(result))
    finally:
        output.close()
    if job.team.size > 1:
        assert output.store is not None
        result = join_runs(result, whole, job.team, output.store)
        if job.team.is_first:  # the others have left the runs from which they went on
            drop_finished(output.store.path, list(result))
    if job.team.is_first and job.ranks.is_first:
        log_result(result)
    job.callbacks.call("on_train_end", result)
    return result
