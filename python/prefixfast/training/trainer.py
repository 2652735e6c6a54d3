"""`train`: one prefix or many on a frozen base, all of them in the same packed batches."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from prefixfast.config import PrefixConfig, TrainConfig, unknown_option
from prefixfast.data.rows import Rows, read_rows
from prefixfast.data.tasks import Task, find_task
from prefixfast.encoder import PrefixParameters, kv_of, parameter_dtype, text_kv
from prefixfast.errors import ConfigError, DataError
from prefixfast.files import replace_file
from prefixfast.model import Model, borrowed
from prefixfast.plan import training_plan
from prefixfast.prefix import Prefix
from prefixfast.training.collate import MicroBatch, Order, micro_batches
from prefixfast.training.examples import Examples, tokenize
from prefixfast.training.optimizer import PrefixAdamW, learning_rates

logger = logging.getLogger(__name__)
DEFAULT_RATE = {"none": 5e-2, "mlp": 1e-3}
ONLY = "prefix"  # the name of a lone prefix in logs
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainRun(Mapping[str, Prefix]):
    """The prefixes of a run by name.

    Attributes:
        prefixes: By name, in the order of the data.
        metrics: By name: final training loss, evaluation loss if there was one, steps, skipped steps, gradient norm.
        log: The lines of log.jsonl.
    """

    prefixes: dict[str, Prefix]
    metrics: dict[str, dict[str, float]]
    log: list[dict[str, Any]] = field(repr=False)

    def __getitem__(self, name: str) -> Prefix:
        return self.prefixes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.prefixes)

    def __len__(self) -> int:
        return len(self.prefixes)


def train(
    model: Any,
    data: Rows | Mapping[str, Rows],
    *,
    task: str | Task | Mapping[str, Any] | None = None,
    eval_data: Rows | Mapping[str, Rows] | None = None,
    init: str | Prefix | Mapping[str, Prefix] = "text",
    init_text: str | None = None,
    output_dir: str | Path | None = None,
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
        task: ``"e2e"``, ``"table"``, ``"prompt"``, a `Task`, or None: told by the rows' keys.
        eval_data: Held-out rows, like ``data``.
        init: ``"text"`` (the keys and values of words), ``"random"``, ``"zero"``, a prefix, or a prefix for each name.
        init_text: The words of ``init="text"``; by default the task's.
        output_dir: Prefixes and ``log.jsonl`` go there: the prefix itself, or one folder a name.
        prefix_config: What is learned.
        config: How it is learned.
        progress: Show a bar; None: when standard error is a terminal.
        fields: Fields of `TrainConfig` or `PrefixConfig`, over ``config`` and ``prefix_config``.

    Returns:
        A `Prefix` for plain rows, a `TrainRun` for a mapping.

    Raises:
        ConfigError: For options that do not fit.
        DataError: For malformed rows.

    Source:
        Li & Liang 2021 (arXiv:2101.00190).
    """
    explicit = frozenset(fields) | (
        frozenset(prefix_config) if isinstance(prefix_config, Mapping) else frozenset(PrefixConfig.names() if prefix_config else ())
    )
    prefix_config, config = _configs(prefix_config, config, fields)
    many = isinstance(data, Mapping)
    rows_of = {str(k): read_rows(v) for k, v in data.items()} if isinstance(data, Mapping) else {ONLY: read_rows(data)}
    if not rows_of:
        msg = "data: expected at least one name with rows, got an empty mapping"
        raise DataError(msg)
    eval_of = (
        None
        if eval_data is None
        else {str(k): read_rows(v) for k, v in eval_data.items()}
        if isinstance(eval_data, Mapping)
        else dict.fromkeys(rows_of, read_rows(eval_data))
    )
    if eval_of is not None and set(eval_of) != set(rows_of):
        msg = f"eval_data: expected the names of data, got {sorted(set(eval_of) ^ set(rows_of))} in one of them only"
        raise ConfigError(msg)
    if output_dir is not None and many:
        _check_names(rows_of)
    first = next(iter(rows_of.values()))[0]
    found = Task("input_ids") if "input_ids" in first and task is None else find_task(task, first)
    with borrowed(model) as base:
        folder = None if output_dir is None else Path(output_dir)
        run = _Run(base, rows_of, eval_of, found, init, init_text, prefix_config, config, folder, single=not many, explicit=explicit).run(progress)
    return run if many else run.prefixes[ONLY]


def _configs(prefix_config: Any, config: Any, fields: dict[str, Any]) -> tuple[PrefixConfig, TrainConfig]:
    known = (*TrainConfig.names(), *PrefixConfig.names())
    for name in fields:
        if name not in known:
            raise ConfigError(unknown_option(name, known, "train"))
    own = {k: v for k, v in fields.items() if k in PrefixConfig.names()}
    return PrefixConfig.make(prefix_config, **own), TrainConfig.make(config, **{k: v for k, v in fields.items() if k not in own})


class _Run:
    """The state of one run."""

    def __init__(
        self, model: Model, rows_of: dict[str, Any], eval_of: dict[str, Any] | None, task: Task, init: Any, init_text: str | None,
        prefix_config: PrefixConfig, config: TrainConfig, output_dir: Path | None, *, single: bool,
        explicit: frozenset[str],
    ) -> None:  # fmt: skip
        self.model, self.task, self.config, self.names, self.output_dir = model, task, config, list(rows_of), output_dir
        self.single = single
        given = _given_prefixes(model, init, self.names)
        self.window = next(iter(given.values())).window if given else "slide"
        if given:
            prefix_config = _conventions(prefix_config, given, explicit)
        start = [kv_of(p, len(model.layers)) for p in given.values()] if given else _initial(model, task, init, init_text, len(self.names), prefix_config)
        self.prefix_config = prefix_config
        self.mlp = prefix_config.reparameterization == "mlp" or (prefix_config.reparameterization == "auto" and init in ("random", "zero"))
        self.peak = config.learning_rate or DEFAULT_RATE["mlp" if self.mlp else "none"]
        self.pos_start = prefix_config.prefix_length if prefix_config.pos_start == "after" else 0
        limit = model.max_positions - self.pos_start
        limit = min(limit, config.max_length or limit)
        self.examples = tokenize(model, rows_of, task, config, limit)
        self.eval_examples = None if eval_of is None else tokenize(model, {n: eval_of[n] for n in self.names}, task, config, limit)
        self.order = Order.draw(self.examples, config)
        dtype = parameter_dtype(model.dtype)
        self.params = PrefixParameters.make(model.layers, start, prefix_config, mlp=self.mlp, seed=config.seed, dtype=dtype, device=model.device)
        self.optimizer = PrefixAdamW(self.params.params, len(self.names), weight_decay=config.weight_decay)
        flags = np.array([[self.pos_start, int(self.window == "slide")]] * len(self.names), np.int32)
        self.prefix_rows = np.concatenate([self.params.rows, flags], 1)
        self.log: list[dict[str, Any]] = []
        self.skipped = torch.zeros(len(self.names), dtype=torch.int64)
        self.evaluation: torch.Tensor | None = None
        self.start = time.perf_counter()
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
            replace_file(output_dir / LOG, b"")

    def run(self, progress: bool | None) -> TrainRun:
        """All steps, evaluation, saving."""
        steps, total = int(self.order.total.max()), torch.from_numpy(self.order.total)
        logger.info(
            "training %d prefixes of %d rows (%s, %d numbers each) for up to %d steps at rate %g: %d examples, longest %d tokens, %d skipped, %d truncated",
            len(self.names), self.params.length, "mlp" if self.mlp else "flat", self.params.num_trained, steps, self.peak, len(self.examples.targets),
            self.examples.lengths.max(), self.examples.skipped, self.examples.truncated,
        )  # fmt: skip
        last = torch.zeros(len(self.names), dtype=torch.float64)
        with tqdm(total=steps, desc="train", unit="step", disable=None if progress is None else not progress) as bar:
            for step in range(steps):
                now, losses, norms, updated = self._step(step, total)
                last = torch.where(now, losses, last)
                bar.update()
                if (step + 1) % self.config.logging_steps == 0 or step + 1 == steps:
                    mean = float(losses[now].mean())
                    bar.set_postfix(loss=f"{mean:.3f}")
                    self._record(step=step + 1, loss=mean, grad_norm=float(norms[now].mean()), prefixes=int(now.sum()), updated=int(updated.sum()))
                if self.eval_examples is not None and (step + 1 == steps or (self.config.eval_steps and (step + 1) % self.config.eval_steps == 0)):
                    self.evaluation = self._evaluate(self.eval_examples)
                    self._record(step=step + 1, eval_loss=float(self.evaluation.mean()))
        return self._finish(last)

    def _step(self, step: int, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step of every prefix that has one left."""
        chosen, prefix = self.order.at(step)
        self.params.refresh(np.full(len(self.names), step, np.int64))
        losses = torch.zeros(len(self.names), dtype=torch.float64)
        sums = self.config.loss == "sequence_sum"
        for micro in micro_batches(self.examples, chosen, prefix, token_budget=self.config.token_budget, sequence_sum=sums, device=self.model.device):
            weighted = self._losses(micro) * micro.weights.to(self.params.params[0][0].dtype)
            weighted.sum().backward()
            losses.index_add_(0, micro.target_prefix.cpu(), weighted.detach().double().cpu())
        self.params.backward()
        now = step < total
        lr = learning_rates(torch.full_like(total, step), total, peak=self.peak, warmup=self.config.warmup_steps, kind=self.config.lr_scheduler_type)
        device = self.model.device
        norms, updated = self.optimizer.step(lr.to(device), now.to(device), self.config.max_grad_norm)
        self.skipped += now & ~updated.cpu()
        return now, losses, norms.cpu(), updated.cpu()

    def _losses(self, micro: MicroBatch) -> torch.Tensor:
        """Cross-entropy of every target token ``[T]``."""
        indptr = np.arange(len(micro.lengths) + 1, dtype=np.int32)
        plan = training_plan(micro.lengths, indptr, micro.prefix, self.prefix_rows, self.params.leaves, backend=self.model.backend, device=self.model.device)
        return self.model.losses(plan.with_logits_at(micro.logits_at), micro.ids, micro.targets)

    @torch.no_grad()
    def _evaluate(self, examples: Examples) -> torch.Tensor:
        """Mean loss of a target token, by prefix."""
        saved, self.params.dropout = self.params.dropout, 0.0
        self.params.refresh(np.zeros(len(self.names), np.int64))
        total, count = (torch.zeros(len(self.names), dtype=torch.float64) for _ in range(2))
        prefix = np.repeat(np.arange(len(self.names), dtype=np.int32), np.diff(examples.first))
        everything = np.arange(len(prefix), dtype=np.int64)
        for micro in micro_batches(examples, everything, prefix, token_budget=self.config.token_budget, sequence_sum=False, device=self.model.device):
            where = micro.target_prefix.cpu()
            total.index_add_(0, where, self._losses(micro).double().cpu())
            count.index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
        self.params.dropout = saved
        return total / count

    def _record(self, **values: Any) -> None:
        line = {"seconds": round(time.perf_counter() - self.start, 3), **values}
        self.log.append(line)
        if self.output_dir is not None:
            with (self.output_dir / LOG).open("a", encoding="utf8") as f:
                f.write(json.dumps(line) + "\n")

    def _finish(self, last: torch.Tensor) -> TrainRun:
        prefixes, metrics = {}, {}
        for i, (name, kv) in enumerate(zip(self.names, self.params.extract(), strict=True)):
            metrics[name] = {"loss": float(last[i]), "steps": float(self.order.total[i]), "skipped_steps": float(self.skipped[i])}
            if self.evaluation is not None:
                metrics[name]["eval_loss"] = float(self.evaluation[i])
            if self.skipped[i]:
                logger.warning(
                    "prefix %r: %d of %d steps were skipped because the gradient was not finite", name, int(self.skipped[i]), int(self.order.total[i])
                )
            training = {
                "num_trained": self.params.num_trained,
                "metrics": metrics[name],
                "config": _plain(self.config),
                "prefix_config": _plain(self.prefix_config),
            }
            linearizer = None if self.task.name == "input_ids" else self.task.spec()
            prefixes[name] = Prefix(
                kv, self.pos_start, self.window, base=self.model.fingerprint, linearizer=linearizer, decoding=dict(self.task.decoding), training=training
            )
            if self.output_dir is not None:
                prefixes[name].save_pretrained(self.output_dir if self.single else self.output_dir / name)
        self._record(metrics=metrics)
        return TrainRun(prefixes, metrics, self.log)


def _given_prefixes(model: Model, init: Any, names: list[str]) -> dict[str, Prefix]:
    """The prefix that each name starts from; empty if ``init`` is a word."""
    if not isinstance(init, Prefix | Mapping):
        return {}
    given = dict.fromkeys(names, init) if isinstance(init, Prefix) else init
    if missing := [n for n in names if not isinstance(given.get(n), Prefix)]:
        msg = f"init: expected a prefix for every name of data, got none for {missing[:5]}"
        raise ConfigError(msg)
    for n in names:
        model.check_prefix(given[n], f"init of {n!r}")
    if len({(given[n].length, given[n].pos_start, given[n].window) for n in names}) != 1:
        msg = "init: expected prefixes of one length, pos_start and window; train the others in a run of their own"
        raise ConfigError(msg)
    return {n: given[n] for n in names}


def _conventions(config: PrefixConfig, given: Mapping[str, Prefix], explicit: frozenset[str]) -> PrefixConfig:
    """Length and positions are those of the given prefixes; options that say otherwise are errors."""
    first = next(iter(given.values()))
    if first.pos_start not in (0, first.length):
        msg = f"init: expected prefixes whose text starts at 0 or after the prefix, got pos_start {first.pos_start} of {first.length} rows"
        raise ConfigError(msg)
    kept = {"prefix_length": first.length, "pos_start": "after" if first.pos_start else "zero"}
    for name in explicit & set(kept):
        if getattr(config, name) != kept[name]:
            msg = f"{name}: the given init has {kept[name]!r}, got {getattr(config, name)!r}; leave it out"
            raise ConfigError(msg)
    return PrefixConfig.make(config, **kept)


def _initial(model: Model, task: Task, init: Any, init_text: str | None, count: int, config: PrefixConfig) -> list[list[Any] | None]:
    """Keys and values that each of ``count`` prefixes starts from; None: random."""
    if init_text is not None and init != "text":
        msg = f"init_text: expected only with init='text', got init={init!r:.40}"
        raise ConfigError(msg)
    if init == "text":
        words = init_text or task.init_text
        (ids,) = model.need_tokenizer().encode([words])
        if not len(ids):
            msg = f"init_text: expected at least one token, got {words!r}"
            raise ConfigError(msg)
        if len(ids) != config.prefix_length:
            logger.info(
                "init text has %d tokens: %s to the prefix's %d rows", len(ids), "cut" if len(ids) > config.prefix_length else "repeated", config.prefix_length
            )
        return [text_kv(model, ids.tolist(), config.prefix_length)] * count
    if init == "zero":
        return [[(torch.zeros(config.prefix_length, s.num_kv_heads, s.head_dim),) * 2 for s in model.layers]] * count
    if init == "random":
        return [None] * count
    msg = f"init: expected 'text', 'random', 'zero', a Prefix or a mapping of them, got {init!r:.80}"
    raise ConfigError(msg)


def _plain(config: PrefixConfig | TrainConfig) -> dict[str, Any]:
    return {n: getattr(config, n) for n in config.names()}


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name in ("", ".", "..", LOG) or {"/", "\\", "\0"} & set(name):
            msg = f"prefix name {name!r} cannot be a folder of output_dir; rename it"
            raise ConfigError(msg)
