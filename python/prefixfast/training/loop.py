"""A group of prefixes from its first step to its last: evaluation, early ends, failures, checkpoints, and each prefix written as it finishes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prefixfast.config import PrefixConfig, TrainConfig
from prefixfast.data.tasks import Task
from prefixfast.errors import ConfigError, DataError
from prefixfast.model.base import Model
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.best_state import Best
from prefixfast.training.callbacks import Hooks
from prefixfast.training.checkpoint import Checkpoint
from prefixfast.training.dataset import collect
from prefixfast.training.groups import PER_PREFIX, Group
from prefixfast.training.init import settle, starting_points
from prefixfast.training.inputs import Given
from prefixfast.training.output_dir import Output
from prefixfast.training.resilience import deferred
from prefixfast.training.step import Steps, Taken

logger = logging.getLogger(__name__)
HOPELESS = 10  # steps in a row without a finite gradient: the parameters do not move, so more of them rarely help
NAMED = 20  # a line of the log tells so many prefixes apart


@dataclass(frozen=True)
class Job:
    """What `train` was asked for, checked.

    Attributes:
        given: The rows.
        task: How they are read.
        groups: Who is trained with whom.
        init_text: Words to start from, None: the task's.
        explicit: Names of options that the caller gave.
        on_top_of: A frozen prefix before every trained one.
        isolate: One prefix's failure is noted, not raised.
        hooks: Callbacks.
        resume: Go on from a checkpoint if there is one.
    """

    given: Given
    task: Task
    groups: list[Group]
    init_text: str | None
    explicit: frozenset[str]
    on_top_of: Prefix | None
    isolate: bool
    hooks: Hooks
    resume: bool


class Run:
    """One group of a job.

    Args:
        model: The base.
        job: What is asked for.
        number: Which group.
        output: Where results go.
    """

    def __init__(self, model: Model, job: Job, number: int, output: Output) -> None:
        self.model, self.job, self.number, self.output = model, job, number, output
        self.failed: dict[str, str] = {}
        group, after = job.groups[number], [] if job.on_top_of is None else [job.on_top_of]
        self.config = group.config
        self.prefix_config = config = settle(
            model, group.members, group.prefix_config, job.explicit, job.task, job.init_text
        )
        self.pos_start = config.length if config.pos_start == "after" else 0
        room = model.max_positions - max([self.pos_start, *(p.pos_start for p in after)])
        limit = min(room, self.config.max_length or room)
        wrong: dict[str, str] = {}
        sources = {m.source: job.given.rows[m.source] for m in group.members}
        note = wrong if job.isolate else None
        corpus = collect(model, sources, job.task, self.config, limit, lines=job.given.lines, failed=note)
        held_out = job.given.evaluation
        self.held_out = (
            None
            if held_out is None
            else collect(model, {s: held_out[s] for s in corpus.span}, job.task, self.config, limit, failed=note)
        )
        sources_left = set(corpus.span) if self.held_out is None else set(self.held_out.span)
        self.group = Group(self.config, config, group.mlp, tuple(m for m in group.members if m.source in sources_left))
        self.names = [m.name for m in self.group.members]
        self.counts = [corpus.counts[m.source] for m in self.group.members]
        self.identity = self._identity(corpus.digest)
        start = starting_points(model, self.group.members, config, job.task, job.init_text, after)
        self.windows: list[Any] = [m.init.window if isinstance(m.init, Prefix) else "slide" for m in self.group.members]
        spans = corpus.spans(m.source for m in self.group.members)
        self.steps = Steps(model, self.group, config, start, self.windows, corpus.examples, spans, job.on_top_of)
        n = len(self.names)
        self.step, self.finished = 0, dict[str, dict[str, Any]]()
        self.active = torch.ones(n, dtype=torch.bool)
        self.last, self.evaluation = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
        self.skipped, self.streak, self.done = (torch.zeros(n, dtype=torch.int64) for _ in range(3))
        keeps = self.held_out is not None and self.config.metric_for_best_model != "last"
        self.best = Best.new(self.steps.params.current() if keeps else [], n)
        self.patience = torch.tensor([m.config.early_stopping_patience or 0 for m in self.group.members])
        self.prefixes: dict[str, Prefix] = {}
        for member in group.members:
            if member.source in wrong:
                self._note(member.name, wrong[member.source])

    def run(self, progress: bool | None) -> None:
        """All steps; afterwards ``prefixes``, ``finished`` and ``failed`` hold the results.

        Raises:
            KeyboardInterrupt: When interrupted; with an output folder there is a checkpoint then.
        """
        restored = self._restore() if self.job.resume else False
        if restored and not bool(self.active.any()):
            return
        total = int(self.steps.total.max())
        params, examples = self.steps.params, self.steps.examples
        logger.info(
            "training %d prefixes of %d rows (%s, %d numbers each) for up to %d steps: %d examples, longest %d tokens, %d skipped, %d truncated%s",
            len(self.names), params.length, "mlp" if self.group.mlp else "flat", params.num_trained, total, len(examples.targets), examples.lengths.max(),
            examples.skipped, examples.truncated, f"; going on after step {self.step}" if restored else "",
        )  # fmt: skip
        self.job.hooks.call("on_train_begin", self.names, total)
        folder = self.output.checkpoint(self.number)
        off = None if progress is None else not progress
        with (
            deferred(folder is not None) as interrupt,
            tqdm(total=total, initial=self.step, desc="train", unit="step", disable=off) as bar,
        ):
            while bool(self.active.any()):
                loss = self._advance()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if folder is not None and (
                    interrupt.requested or (self.config.save_steps and self.step % self.config.save_steps == 0)
                ):
                    self._checkpoint().write(folder)
                if interrupt.requested:
                    raise KeyboardInterrupt
        if folder is not None and (self.config.save_steps or folder.exists()):
            self._checkpoint().write(folder)

    def _advance(self) -> float:
        """One step of all active prefixes and what follows from it; returns their mean loss."""
        taken = self.steps.take(self.step, self.active)
        self.step += 1
        now = taken.now
        self.done += now
        self.last = torch.where(now, taken.losses, self.last)
        self.skipped += now & ~taken.updated
        self.streak = torch.where(now, torch.where(taken.updated, 0, self.streak + 1), self.streak)
        self.job.hooks.call("on_step", self.step, taken.losses, taken.norms, now)
        hopeless = now & ((self.streak >= HOPELESS) | ((self.done == self.steps.total) & (self.skipped == self.done)))
        for i in hopeless.nonzero()[:, 0].tolist():
            self._fail(
                i,
                f"the gradient was not finite in {int(self.streak[i])} steps in a row: lower learning_rate, or train in another dtype",
            )
        last = now & (self.done == self.steps.total)
        evaluated = self._evaluate(now & self.active & self._due(last))
        if evaluated is not None:
            last = last | (now & self.best.exhausted(self.patience))
        self._finish(last & self.active)
        self._log(taken, evaluated)
        return float(taken.losses[now].mean())

    def _due(self, last: Tensor) -> Tensor:
        every = self.config.eval_steps
        if self.held_out is None:
            return torch.zeros_like(last)
        return torch.ones_like(last) if every and self.step % every == 0 else last

    def _evaluate(self, due: Tensor) -> Tensor | None:
        """Which prefixes were evaluated, None for none."""
        if self.held_out is None or not bool(due.any()):
            return None
        spans = self.held_out.spans(m.source for m in self.group.members)
        loss = self.steps.evaluate(self.held_out.examples, spans, due)
        self.evaluation = torch.where(due, loss, self.evaluation)
        self.best.update(due, loss, self.step, self.steps.params.current() if self.best.kept else [])
        names = due.nonzero()[:, 0].tolist()
        self.job.hooks.call("on_evaluate", self.step, {self.names[i]: float(loss[i]) for i in names})
        return due

    def _log(self, taken: Taken, evaluated: Tensor | None) -> None:
        """The lines of this step."""
        where = {"group": self.number} if len(self.job.groups) > 1 else {}
        now = taken.now
        if self.step % self.config.logging_steps == 0 or not bool(self.active.any()):
            values = {
                "loss": float(taken.losses[now].mean()),
                "grad_norm": float(taken.norms[now].mean()),
                "prefixes": int(now.sum()),
            }
            self._line(
                step=self.step,
                **where,
                **values,
                updated=int(taken.updated.sum()),
                **self._by_prefix("loss", now, taken.losses),
            )
        if evaluated is not None:
            loss = float(self.evaluation[evaluated].mean())
            self._line(
                step=self.step, **where, eval_loss=loss, **self._by_prefix("eval_loss", evaluated, self.evaluation)
            )

    def _by_prefix(self, key: str, which: Tensor, values: Tensor) -> dict[str, Any]:
        if not 1 < len(self.names) <= NAMED:
            return {}
        return {f"{key}_by_prefix": {self.names[i]: float(values[i]) for i in which.nonzero()[:, 0].tolist()}}

    def _line(self, **values: Any) -> None:
        self.job.hooks.call("on_log", self.output.record(**values))

    def _finish(self, ended: Tensor) -> None:
        """Prefixes at their end: kept, saved, told."""
        if not bool(ended.any()):
            return
        params, current = self.steps.params, self.steps.params.current()
        for i in ended.nonzero()[:, 0].tolist():
            name, metrics = self.names[i], self._metrics(i)
            flat = self.best.kept if self.best.kept and int(self.best.step[i]) else current
            try:
                prefix = self._prefix(i, params.split(flat, i), metrics)
            except DataError as e:  # the parameters themselves are not finite
                self._fail(i, f"the prefix is not usable: {e}; lower learning_rate")
                continue
            self.active[i] = False
            self.output.save(name, prefix, again=self.job.resume)
            self.prefixes[name] = prefix
            self.finished[name] = {"digest": prefix.digest, "metrics": metrics}
            if self.skipped[i]:
                logger.warning(
                    "prefix %r: %d of %d steps were skipped because the gradient was not finite",
                    name,
                    self.skipped[i],
                    self.done[i],
                )
            self.job.hooks.call("on_prefix_end", name, prefix, metrics)

    def _metrics(self, i: int) -> dict[str, float]:
        found = {"loss": float(self.last[i]), "steps": float(self.done[i]), "skipped_steps": float(self.skipped[i])}
        if self.held_out is not None:
            kept = bool(self.best.kept) and int(self.best.step[i]) > 0
            found["eval_loss"] = float(self.best.loss[i] if kept else self.evaluation[i])
            found["best_step"] = float(self.best.step[i] if kept else self.done[i])
        return found | {k: float(v) for k, v in self.counts[i].items()}

    def _prefix(self, i: int, kv: dict[str, Tensor], metrics: dict[str, float]) -> Prefix:
        member, task, before = self.group.members[i], self.job.task, self.job.on_top_of
        training: dict[str, Any] = {"num_trained": self.steps.params.num_trained, "metrics": metrics}
        if self.prefix_config.frozen_rows:
            training["num_frozen_tokens"] = self.prefix_config.frozen_rows  # a CARTRIDGE in PEFT
        training |= {"config": plain(member.config), "prefix_config": plain(self.prefix_config)}
        if before is not None:
            training["on_top_of"] = before.digest
        spec, decoding = None if task.name == "input_ids" else task.spec(), dict(task.decoding)
        if task.bad_words and self.model.tokenizer is not None:
            found = self.model.tokenizer.encode(list(task.bad_words), add_special_tokens=False)
            decoding["bad_words_ids"] = [ids.tolist() for ids in found if len(ids)]
        conventions: dict[str, Any] = {"base": self.model.fingerprint, "task": spec, "decoding": decoding}
        return Prefix(kv, self.pos_start, self.windows[i], training=training, **conventions)

    def _fail(self, i: int, error: str) -> None:
        self.active[i] = False
        if not self.job.isolate:
            msg = f"prefix {self.names[i]!r}: {error}"
            raise ConfigError(msg)
        self._note(self.names[i], error)

    def _note(self, name: str, error: str) -> None:
        logger.warning("prefix %r failed: %s", name, error)
        self.failed[name] = error
        self.job.given.failed[name] = error
        self.output.write_failed(self.job.given.failed)
        self.job.hooks.call("on_prefix_failed", name, error)

    def _identity(self, digests: dict[str, str]) -> dict[str, Any]:
        """What a checkpoint must agree with for this run to go on from it."""
        members, after = self.group.members, self.job.on_top_of
        own = {
            m.name: {f: getattr(m.config, f) for f in PER_PREFIX if getattr(m.config, f) != getattr(self.config, f)}
            for m in members
        }
        return {
            "base": {k: v for k, v in self.model.fingerprint.items() if k in ("config", "weights")}
            | {"dtype": str(self.model.dtype)},
            "data": {m.name: digests[m.source] for m in members},
            "eval_data": {} if self.held_out is None else {m.name: self.held_out.digest[m.source] for m in members},
            "task": self.job.task.spec(),
            "config": plain(self.config),
            "own config": {name: fields for name, fields in own.items() if fields},
            "prefix_config": plain(self.prefix_config),
            "init": {m.name: m.init.digest if isinstance(m.init, Prefix) else m.init for m in members},
            "init_text": self.job.init_text,
            "on_top_of": None if after is None else after.digest,
        }

    def _vectors(self) -> dict[str, Tensor]:
        return {n: getattr(self, n) for n in ("active", "last", "evaluation", "skipped", "streak", "done")}

    def _checkpoint(self) -> Checkpoint:
        """This moment, between two steps; once all prefixes are done, without tensors."""
        state = {
            "step": self.step,
            "token_budget": self.steps.budget.tokens,
            "log_lines": len(self.output.log),
            "finished": self.finished,
            "failed": self.failed,
        }
        tensors = self._vectors()
        if bool(self.active.any()):
            tensors |= {f"steps.{n}": t for n, t in self.steps.state().items()} | {
                f"best.{n}": t for n, t in self.best.state().items()
            }
        return Checkpoint(self.identity, state, tensors)

    def _restore(self) -> bool:
        """Go on from the group's checkpoint; False without one."""
        folder = self.output.checkpoint(self.number)
        found = None if folder is None else Checkpoint.read(folder)
        if folder is None or found is None:
            logger.info("resume: there is no checkpoint in %s, starting at the first step", folder)
            self.output.cut_log(None, self.number)
            return False
        found.check(self.identity, folder)
        state, tensors = found.state, found.tensors
        self.step, self.finished = state["step"], state["finished"]
        self.steps.budget.tokens = (
            min(self.steps.budget.tokens, state["token_budget"]) if self.steps.budget.auto else self.steps.budget.tokens
        )
        for name, own in self._vectors().items():
            own.copy_(tensors[name])
        if bool(self.active.any()):
            self.output.cut_log(state["log_lines"], self.number)
            for part, target in (("steps.", self.steps), ("best.", self.best)):
                target.load({n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)})
        for name, error in state["failed"].items():
            self.failed[name] = self.job.given.failed[name] = error
        self.output.write_failed(self.job.given.failed)
        for name, told in self.finished.items():
            place = self.output.place(name)
            assert place is not None
            prefix = Prefix.from_pretrained(place)
            if prefix.digest != told["digest"]:
                msg = f"{place}: expected the prefix that this run finished; another one lies there: move it away and give resume=False"
                raise DataError(msg, path=str(place))
            self.prefixes[name] = prefix
        return True


def plain(config: PrefixConfig | TrainConfig) -> dict[str, Any]:
    """The fields by name."""
    return {f.name: getattr(config, f.name) for f in fields(config)}
