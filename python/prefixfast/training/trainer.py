"""`train`: one prefix or many on a frozen base, all of them in the same packed batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefixfast.config import PrefixConfig, TrainConfig
from prefixfast.data.rows import Rows
from prefixfast.data.tasks import Task, find_task
from prefixfast.errors import ConfigError, DataError
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.shared_base import borrowed
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore
from prefixfast.training.callbacks import Hooks, reporter
from prefixfast.training.groups import make_groups
from prefixfast.training.init import settle
from prefixfast.training.inputs import ONLY, Given, check_names, gather, settings
from prefixfast.training.loop import Job, Run
from prefixfast.training.output_dir import Output
from prefixfast.training.resilience import recomputed
from prefixfast.training.train_run import TrainRun

__all__ = ["TrainRun", "base_for", "check_groups", "prepare", "train"]


def train(
    model: Any,
    data: Rows | Mapping[str, Rows],
    *,
    task: str | Task | Mapping[str, Any] | None = None,
    prefix_column: str | None = None,
    eval_data: Rows | Mapping[str, Rows] | None = None,
    init: str | Prefix | Mapping[str, Prefix] | None = None,
    init_text: str | None = None,
    on_top_of: Prefix | str | None = None,
    objective: Literal["sft"] = "sft",
    sweep: Mapping[str, Sequence[Any]] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    store: PrefixStore | str | Path | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    on_error: Literal["isolate", "raise"] = "isolate",
    callbacks: Sequence[Any] = (),
    prefix_config: PrefixConfig | Mapping[str, Any] | None = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **fields: Any,
) -> Prefix | TrainRun:
    """Train one prefix, or one for each name, on a frozen base.

    Args:
        model: Hub id, folder, Hugging Face model (given back as it was) or `Model`.
        data: Rows (a file, or an iterable of mappings) for one prefix; a mapping of names to rows for one prefix each, trained in the same batches with
            the result that each would have alone.
        task: A name (``"e2e"``, ``"webnlg"``, ``"table"``, ..., see docs/rows.md), a `Task`, or None: told by the rows' keys.
        prefix_column: The key of plain rows that names each row's prefix: one prefix for each of its values.
        eval_data: Held-out rows: for all prefixes, or by name (or with ``prefix_column``) like ``data``.
        init: ``"text"`` (the keys and values of words), ``"random"``, ``"zero"``, a prefix, or a prefix for each name; by default the recipe's, ``"text"``.
        init_text: The words of ``init="text"``; by default the task's.
        on_top_of: A prefix (or its name in ``store``) that stays as it is and comes before each new one, in training as in ``generate(..., [[it, new]])``.
        objective: ``"sft"``: the likelihood of each row's target, as in Li & Liang; there is no other yet.
        sweep: By field (or ``init``) a list of values: every combination is trained, in the same batches where the field may differ by prefix
            (`prefixfast.training.groups.PER_PREFIX`); see `TrainRun.best`.
        overrides: By name, fields of that prefix alone: ``{"ann": {"learning_rate": 1e-3}}``.
        store: A `PrefixStore` or its path: each prefix is put there at once when it finishes (plain rows as ``"prefix"``).
        output_dir: Prefixes, ``log.jsonl``, ``failed.jsonl`` and checkpoints go there: the prefix itself, or one folder a name.
        resume: Go on from the checkpoint in ``output_dir``, if there is one; on a CPU the result is that of the uncut run, to the bit.
        on_error: With several prefixes: what happens when one fails by its rows or its numbers. ``"isolate"``: it is reported in `TrainRun.failed` and
            the others go on; ``"raise"``.
        callbacks: Objects with some of the hooks of `prefixfast.training.callbacks.Callback`.
        prefix_config: What is learned.
        config: How it is learned.
        progress: Show a bar; None: when standard error is a terminal.
        fields: Fields of `TrainConfig` or `PrefixConfig`, over ``config`` and ``prefix_config``.

    Returns:
        A `Prefix` for plain rows, a `TrainRun` for a mapping, a ``prefix_column`` or a sweep.

    Raises:
        ConfigError: For options that do not fit, and for a checkpoint of another run.
        DataError: For malformed rows.
        BaseMismatchError: For a given prefix of another base.
        CapacityError: If memory runs out on a single example.
        KeyboardInterrupt: When interrupted; with ``output_dir`` after a checkpoint.

    Example:
        >>> rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+4=", "completion": "7"}]
        >>> prefix = train(base, rows, prefix_length=4, max_steps=2)
        >>> prefix.length, prefix.training["metrics"]["steps"]
        (4, 2.0)
        >>> users = train(base, {"ann": rows, "bob": rows[:1], "eve": [{}]}, task="prompt", max_steps=2, output_dir="users", resume=True)
        >>> list(users), list(users.failed), users.metrics["bob"]["examples"]
        (['ann', 'bob'], ['eve'], 1.0)

    Source:
        Li & Liang 2021 (arXiv:2101.00190).
    """
    kept = PrefixStore(store) if isinstance(store, str | Path) else store
    job, chosen = prepare(
        data, task=task, prefix_column=prefix_column, eval_data=eval_data, init=init, init_text=init_text, on_top_of=on_top_of,
        objective=objective, sweep=sweep, overrides=overrides, store=kept, resume=resume, on_error=on_error, callbacks=callbacks,
        prefix_config=prefix_config, config=config, fields=fields,
    )  # fmt: skip
    single = job.given.single and sweep is None
    folder = None if output_dir is None else Path(output_dir)
    if resume and folder is None:
        msg = "resume: expected output_dir beside it, where the checkpoint lies"
        raise ConfigError(msg)
    if folder is not None and not single:
        check_names([*(m.name for g in job.groups for m in g.members), *job.given.failed])
    if chosen.report_to != "none":
        job.hooks.callbacks.append(reporter(chosen.report_to, None if folder is None else str(folder)))
    output = Output(folder, kept, single=single)
    runs: list[Run] = []
    with base_for(model, chosen) as base, recomputed(base, chosen.gradient_checkpointing):
        check_groups(base, job)
        for number in range(len(job.groups)):
            run = Run(base, job, number, output)
            if not runs:  # everything of the first group is checked: what an earlier run left may go
                output.open(resume=resume)
                output.write_failed(job.given.failed)
            run.run(progress)
            runs.append(run)
    result = _result(runs, job, output)
    job.hooks.call("on_train_end", result)
    return result.prefixes[ONLY] if single else result


def prepare(
    data: Any, *, task: Any, prefix_column: str | None, eval_data: Any, init: Any, init_text: str | None, on_top_of: Any,
    objective: Any, sweep: Any, overrides: Any, store: PrefixStore | None, resume: bool, on_error: str,
    callbacks: Sequence[Any], prefix_config: Any, config: Any, fields: Mapping[str, Any],
) -> tuple[Job, TrainConfig]:  # fmt: skip
    """Check everything that needs no model; see `train`. Returns the job and the options that all groups share."""
    if objective != "sft":
        msg = f"objective: expected 'sft' (the likelihood of the targets; there is no other yet), got {objective!r:.80}"
        raise ConfigError(msg)
    if on_error not in ("isolate", "raise"):
        msg = f"on_error: expected 'isolate' or 'raise', got {on_error!r}"
        raise ConfigError(msg)
    hooks = Hooks(callbacks)
    settings(
        config, prefix_config, fields, init=init, init_text=init_text, task=""
    )  # refuse wrong options before reading rows
    given = gather(data, eval_data, prefix_column, isolate=on_error == "isolate")
    found = _task(given, task)
    chosen = settings(config, prefix_config, fields, init=init, init_text=init_text, task=found.name)
    groups = make_groups(given.rows, chosen, overrides=overrides, sweep=sweep, single=given.single, known=given.failed)
    members = [m.config for g in groups for m in g.members]
    if eval_data is None and any(c.metric_for_best_model == "eval_loss" or c.early_stopping_patience for c in members):
        msg = "early_stopping_patience and metric_for_best_model='eval_loss': expected eval_data beside them"
        raise ConfigError(msg)
    if isinstance(on_top_of, str):
        if store is None:
            msg = f"on_top_of: expected a Prefix, or a store beside the name {on_top_of!r}"
            raise ConfigError(msg)
        on_top_of = store[on_top_of]
    if on_top_of is not None and not isinstance(on_top_of, Prefix):
        msg = f"on_top_of: expected a Prefix or a name in the store, got {type(on_top_of).__name__}"
        raise ConfigError(msg)
    isolate = on_error == "isolate" and not given.single
    return Job(
        given, found, groups, chosen.init_text, chosen.explicit | {*(sweep or ())}, on_top_of, isolate, hooks, resume
    ), chosen.config


def check_groups(model: Model, job: Job) -> None:
    """Refuse what does not fit the model, for all groups before the first is trained."""
    for group in job.groups:
        settle(model, group.members, group.prefix_config, job.explicit, job.task, job.init_text)
    if job.on_top_of is not None:
        check_fits(model, job.on_top_of, "on_top_of")


def _task(given: Given, task: Any) -> Task:
    """The task that was given, or that of the first prefix whose rows tell one."""
    rows = list(given.rows.values())
    for i, own in enumerate(rows):
        if task is None and "input_ids" in own[0]:
            return Task("input_ids")
        try:
            return find_task(task, own[0])
        except DataError:
            if i + 1 == len(rows):
                raise
    raise AssertionError


@contextlib.contextmanager
def base_for(model: Any, config: TrainConfig) -> Iterator[Model]:
    """The base for the time of a run, in the dtype that was asked for.

    Raises:
        ConfigError: For a model that cannot work, or one that has another dtype already.
    """
    how = {"dtype": config.dtype} if isinstance(model, str | Path) else {}
    with borrowed(model, **how) as base:
        if config.dtype != "auto" and base.dtype != DTYPES[config.dtype]:
            msg = (
                f"dtype: the given model computes in {base.dtype}, got {config.dtype!r}; load it so, or leave dtype out"
            )
            raise ConfigError(msg)
        yield base


def _result(runs: Sequence[Run], job: Job, output: Output) -> TrainRun:
    """The prefixes of all groups in the order of the data."""
    prefixes = {n: p for run in runs for n, p in run.prefixes.items()}
    metrics = {n: told["metrics"] for run in runs for n, told in run.finished.items()}
    place = {name: i for i, name in enumerate(job.given.rows)}
    members = sorted((m for g in job.groups for m in g.members), key=lambda m: place[m.source])
    order = [m.name for m in members if m.name in prefixes]
    if not (output.log and "metrics" in output.log[-1]):
        output.record(metrics={n: metrics[n] for n in order})
    variants = {m.name: {"of": m.source, **m.variant} for m in members if m.variant}
    return TrainRun(
        {n: prefixes[n] for n in order}, {n: metrics[n] for n in order}, output.log, dict(job.given.failed), variants
    )
