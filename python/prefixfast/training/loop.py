"""`GroupTrainer`: the training of a group of prefixes from the first step to the last.

The loop evaluates the prefixes, ends each of them at its own last step, isolates failures, writes checkpoints, and
saves each prefix when it is finished.

Shape letter: n prefixes of the group.
"""

from __future__ import annotations

import logging
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.io.progress import Progress
from prefixfast.model.memory import peak_memory
from prefixfast.model.process import check_not_exiting
from prefixfast.store.entry import StoredPrefix
from prefixfast.store.tensor_rows import OWNERS
from prefixfast.training.applied import Applied
from prefixfast.training.artifact import ArtifactBuilder
from prefixfast.training.best_state import BestState
from prefixfast.training.checkpoint import Checkpoint
from prefixfast.training.early_stopping import out_of_patience
from prefixfast.training.group_data import GroupData
from prefixfast.training.job import TrainJob
from prefixfast.training.methods.state import Artifact, make
from prefixfast.training.metrics import prefix_metrics
from prefixfast.training.output_dir import OutputDir
from prefixfast.training.prefix_tensor import PrefixTensor
from prefixfast.training.progress import GroupProgress
from prefixfast.training.resilience import defer_sigint
from prefixfast.training.run_log import settings_line
from prefixfast.training.saving import SAVED_TOGETHER, save_together
from prefixfast.training.step import GroupExamples, StepResult, StepRunner

logger = logging.getLogger(__name__)
MAX_LOGGED_PREFIXES = 20  # largest group whose log lines hold the losses of each prefix


class GroupTrainer:
    """Trains one group of prefixes.

    Args:
        data: Group with its rows.
        number: Number of the group in the run.
        output: Output folder and store.

    Attributes:
        prefixes: Finished prefixes by name, or their versions in the store.
        finished: Digest and metrics of each finished prefix by name.
        failed: Error message of each failed prefix by name.
        resumed: Names of the prefixes that an earlier run has finished.
        num_taken: Number of examples of all steps since the run began or was resumed.
        num_tokens: Number of tokens of these examples.
        seconds: Time from the first of these steps to the end of the group in seconds, with evaluation and saving.

    Raises:
        ConfigError: If options do not fit the base model.
        BaseMismatchError: If a given prefix was made for another base model.
    """

    def __init__(self, data: GroupData, number: int, output: OutputDir) -> None:
        self.data, self.number, self.output = data, number, output
        self.model, self.job, self.group, self.ranks = data.model, data.job, data.group, data.job.ranks
        self.eval_dataset, self.config = data.eval_dataset, data.group.config
        self.prefixes: dict[str, Artifact | StoredPrefix] = {}
        self.finished: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.resumed: list[str] = []
        jobs = self.group.jobs
        self.names = [j.name for j in jobs]
        self.counts = [data.dataset.counts[j.name] for j in jobs]
        if self.eval_dataset is not None:
            held_out = [self.eval_dataset.counts[j.name]["rows"] for j in jobs]
            self.counts = [c | {"eval_rows": count} for c, count in zip(self.counts, held_out, strict=True)]
        with Progress("make initial values"):
            examples = GroupExamples(data.dataset.examples, data.dataset.spans(j.name for j in jobs))
            self.runner = StepRunner(self.model, self.group, make(data), examples, self.ranks)
        self.applied = Applied(self.runner.params, self.model.guard)
        self.builder = ArtifactBuilder.make(data, self.runner.params)
        self.num_steps = self.num_taken = self.num_tokens = 0
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self._losses: Tensor | None = None  # those of the last step, of the prefixes that took it
        self.progress = GroupProgress.new(self.runner.total)
        keeps_best = self.eval_dataset is not None and self.config.metric_for_best_model != "last"
        self.best = BestState.new(self.runner.params.current() if keeps_best else [], len(jobs))
        self.patience = torch.tensor([j.config.early_stopping_patience or 0 for j in jobs])

    def run(self) -> None:
        """Train until no prefix is active.

        Raises:
            KeyboardInterrupt: If the user interrupts; with an output folder a checkpoint is written first.
        """
        is_restored = self._restore() if self.job.resume else False
        if is_restored and not self.is_active:
            return
        folder = self.output.checkpoint_folder(self.number)
        if not is_restored and folder is not None and self.config.save_steps:
            self._start_checkpoint().write(folder)
        total = int(self.runner.total.max())
        resumed = f"; resumed after step {self.num_steps}" if is_restored else ""
        active = self.progress.active.nonzero()[:, 0].tolist()
        logger.info("%s%s", settings_line(self.data, self.runner, active), resumed)
        self.job.callbacks.call("on_train_begin", self.names, total)
        start, saves = time.perf_counter(), self.ranks.any(folder is not None)
        label = f"train group {self.number}" if self.number or len(self.job.groups) > 1 else "train"
        with (
            self.applied,
            self.model.training_layers(),
            defer_sigint(saves) as interrupt,
            Progress(label, total, "steps", initial=self.num_steps) as work,
        ):
            work.details = self._details
            if not is_restored:
                self._evaluate_before()
            if not total and self.is_active:
                self._finish_untrained()
            while self.is_active:
                self.applied.put_in()
                check_not_exiting()
                self._advance()
                self.applied.let_others_in()
                work.update(rows=self.runner.num_taken * self.data.rows_per_example, tokens=self.runner.num_tokens)
                is_due = bool(self.config.save_steps) and self.num_steps % (self.config.save_steps or 1) == 0
                is_interrupted = self.ranks.any(interrupt.requested)
                if folder is not None and (is_interrupted or is_due):
                    self._checkpoint().write(folder)
                if is_interrupted:
                    raise KeyboardInterrupt
        if folder is not None and (self.config.save_steps or folder.exists()):
            self._checkpoint().write(folder)
        self.seconds = time.perf_counter() - start

    def free(self) -> None:
        """Free parameters and optimizer state of a group that has ended; what it has made stays."""
        del self.runner, self.applied, self.best, self.builder

    @property
    def is_active(self) -> bool:
        """Whether a prefix is still trained."""
        return bool(self.progress.active.any())

    def _details(self) -> str:
        """Loss of the last step and numbers of prefixes that have ended or are trained, for reports of the progress."""
        loss = [] if self._losses is None else [f"loss {float(self._losses.mean()):.3f}"]
        active, every = int(self.progress.active.sum()), self.job.rows.failed
        counts = [f"{len(self.finished)} of {len(self.names)} prefixes finished, {active} in training"]
        failed = [f"{len(every)} failed"] if every else []
        return ", ".join(loss + (counts if len(self.names) > 1 else []) + failed)

    def _evaluate_before(self) -> None:
        """Evaluate every prefix before its first step. Best states and early stopping count later evaluations only."""
        if self.eval_dataset is None:
            return
        due = self.progress.active
        self.progress.eval_loss_before = self._eval_losses(due)
        self._write_eval_line(due, self.progress.eval_loss_before)

    def _finish_untrained(self) -> None:
        """Finish the prefixes of a method without steps, with the losses of what a first step would train on."""
        progress = self.progress
        self.applied.put_in()
        progress.first_loss = progress.loss = self.runner.first_losses()
        progress.eval_loss = progress.eval_loss_before
        self._finish(progress.active.clone())

    def _advance(self) -> None:
        """Take one step of all active prefixes, with everything that follows from it."""
        progress = self.progress
        start = time.perf_counter()
        result = self.runner.step(self.num_steps, progress.active)
        self.step_seconds.append(time.perf_counter() - start)
        self.num_steps += 1
        self.num_taken += self.runner.num_taken
        self.num_tokens += self.runner.num_tokens
        now = result.active
        self._losses = result.losses[now]
        progress.record(result)
        self._call_hook("on_step", self.num_steps, result.losses, result.grad_norms, now)
        for i in (now & progress.hopeless).nonzero()[:, 0].tolist():
            count = int(progress.num_nonfinite[i])
            advice = "lower learning_rate, or train in another dtype"
            self._fail(i, f"the gradient was not finite in {count} steps in a row: {advice}")
        ends = now & progress.at_last_step
        evaluated = self._evaluate(now & progress.active & self._due(ends))
        if evaluated is not None:
            ends = ends | (now & out_of_patience(self.best.num_worse, self.patience))
        self._finish(ends & progress.active)
        self._write_log(result, evaluated)

    def _due(self, ends: Tensor) -> Tensor:
        """Prefixes to evaluate after this step, bool ``[n]``: all every ``eval_steps``, else those that end."""
        if self.eval_dataset is None:
            return torch.zeros_like(ends)
        every = self.config.eval_steps
        return torch.ones_like(ends) if every and self.num_steps % every == 0 else ends

    def _evaluate(self, due: Tensor) -> Tensor | None:
        """Evaluate the prefixes that are due; returns them, or None if there are none."""
        if self.eval_dataset is None or not bool(due.any()):
            return None
        loss = self._eval_losses(due)
        self.progress.eval_loss = torch.where(due, loss, self.progress.eval_loss)
        self.best.update(due, loss, self.num_steps, self.runner.params.current() if self.best.kv else [])
        return due

    def _eval_losses(self, due: Tensor) -> Tensor:
        """Losses on the held-out rows ``[n]``, which count where ``due`` is set."""
        assert self.eval_dataset is not None
        spans = self.eval_dataset.spans(j.name for j in self.group.jobs)
        self.applied.put_in()
        loss = self.runner.evaluate(GroupExamples(self.eval_dataset.examples, spans), due)
        losses = {self.names[i]: float(loss[i]) for i in due.nonzero()[:, 0].tolist()}
        self._call_hook("on_evaluate", self.num_steps, losses)
        return loss

    def _write_log(self, result: StepResult, evaluated: Tensor | None) -> None:
        """Write the log lines of this step."""
        now = result.active
        if self.num_steps % self.config.logging_steps == 0 or not self.is_active:
            values: dict[str, JSON] = {
                "loss": float(result.losses[now].mean()),
                "grad_norm": float(result.grad_norms[now].mean()),
                "prefixes": int(now.sum()),
                "updated": int(result.updated.sum()),
            }
            self._write_line(values | self._by_prefix("loss", now, result.losses))
        if evaluated is not None:
            self._write_eval_line(evaluated, self.progress.eval_loss)

    def _write_eval_line(self, evaluated: Tensor, losses: Tensor) -> None:
        mean: dict[str, JSON] = {"eval_loss": float(losses[evaluated].mean())}
        self._write_line(mean | self._by_prefix("eval_loss", evaluated, losses))

    def _by_prefix(self, key: str, which: Tensor, values: Tensor) -> dict[str, JSON]:
        if not 1 < len(self.names) <= MAX_LOGGED_PREFIXES:
            return {}
        return {f"{key}_by_prefix": {self.names[i]: float(values[i]) for i in which.nonzero()[:, 0].tolist()}}

    def _write_line(self, values: dict[str, JSON]) -> None:
        group: dict[str, JSON] = {"group": self.number} if self.number or len(self.job.groups) > 1 else {}
        self._call_hook("on_log", self.output.write_log(step=self.num_steps, **(group | values)))

    def _finish(self, ended: Tensor) -> None:
        """Save the prefixes that have ended, at their best or last state."""
        if not bool(ended.any()):
            return
        self.applied.take_out()  # weights are built from what they change in the base as it was
        current, numbers = self.runner.params.current(), ended.nonzero()[:, 0].tolist()
        for start in range(0, len(numbers), SAVED_TOGETHER):
            built = self._build(numbers[start : start + SAVED_TOGETHER], current)
            prefixes = {self.names[i]: prefix for i, (prefix, _) in built.items()}
            save = partial(save_together, self.output, prefixes, resumed=self.job.resume, isolate=self.job.isolate)
            saved = self.ranks.first(save)
            for (i, (prefix, metrics)), (stored, error) in zip(built.items(), saved, strict=True):
                if error:
                    self._fail(i, error)
                    continue
                name = self.names[i]
                self.prefixes[name] = prefix if stored is None else stored
                self.finished[name] = {"digest": prefix.digest, "metrics": metrics}
                if skipped := int(self.progress.num_skipped[i]):
                    logger.warning(
                        "prefix %r: %d of %d steps were skipped because the gradient was not finite",
                        *(name, skipped, int(self.progress.num_done[i])),
                    )
                self._call_hook("on_prefix_end", name, prefix, metrics)

    def _build(self, numbers: list[int], current: list[PrefixTensor]) -> dict[int, tuple[Artifact, dict[str, float]]]:
        """Usable prefixes that have ended, with their metrics, by number."""
        params, built = self.runner.params, {}
        for i in numbers:
            metrics = prefix_metrics(
                self.progress, self.best, i, self.counts[i], evaluated=self.eval_dataset is not None
            )
            flat = self.best.kv if self.best.has(i) else current
            try:
                built[i] = self.builder.build(i, params.split(flat, i), metrics, self._cost()), metrics
            except DataError as e:  # the parameters themselves are not finite
                self._fail(i, f"the prefix is not usable: {e}; lower learning_rate")
            self.progress.active[i] = False
        return built

    def _cost(self) -> dict[str, JSON]:
        """Median of the seconds of a step, None without steps, and the largest memory use since the run began."""
        seconds = statistics.median(self.step_seconds) if self.step_seconds else None
        return {"seconds_per_step": seconds, "peak_bytes": peak_memory(self.model.device)}

    def _call_hook(self, hook: str, *values: Any) -> None:
        """Call a hook of the callbacks, which finds the base model as it was before the run."""
        if self.job.callbacks.has(hook):
            self.applied.take_out()
            self.job.callbacks.call(hook, *values)

    def _fail(self, i: int, error: str) -> None:
        """End a prefix with an error, which is raised if failures are not isolated."""
        self.progress.active[i] = False
        if not self.job.isolate:
            msg = f"prefix {shown(self.names[i])}: {error}"
            raise ConfigError(msg)
        self.failed[self.names[i]] = error
        self.applied.take_out()
        note_failure(self.job, self.output, self.names[i], error)

    def _checkpoint(self) -> Checkpoint:
        """State between two steps; without the large tensors once all prefixes have ended."""
        state = {
            "names": self.names,
            "step": self.num_steps,
            "token_budget": self.runner.budget.tokens,
            "log_lines": len(self.output.log),
            "finished": self.finished,
            "failed": self.failed,
            OWNERS: self._owners(),
        }
        tensors = self.progress.state()
        if self.is_active:
            tensors |= {f"steps.{n}": t for n, t in self.runner.state().items()}
            tensors |= {f"best.{n}": t for n, t in self.best.state().items()}
        return Checkpoint(self.data.identity, state, tensors)

    def _owners(self) -> dict[str, list[int]]:
        """Prefixes with rows in each tensor of a checkpoint that does not have rows of all of them."""
        named = {f"steps.{n}": t for n, t in self.runner.named().items()}
        named |= {f"best.{n}": t for n, t in self.best.named().items()}
        return {n: t.owners.tolist() for n, t in named.items() if t.owners is not None}

    def _start_checkpoint(self) -> Checkpoint:
        """State before the first step, by which a run that is killed soon is told from others when it is resumed."""
        state = {"names": self.names, "step": 0, "log_lines": len(self.output.log), "finished": {}, "failed": {}}
        return Checkpoint(self.data.identity, state, {})

    def _restore(self) -> bool:
        """Continue from the group's checkpoint; False without one."""
        identity = self.data.identity
        found = self.ranks.first(lambda: self.output.read_checkpoint(self.number, identity))
        if found is None:
            return False
        state, tensors, budget = found.state, found.tensors, self.runner.budget
        self.num_steps, self.finished = state["step"], state["finished"]
        if budget.is_auto:
            budget.tokens = min(budget.tokens, state["token_budget"])
        self.progress.load(tensors)
        if self.is_active:
            if state.get(OWNERS, {}) != self._owners():
                msg = "resume: the checkpoint has the prefixes in another order; give overwrite=True to start again"
                raise DataError(msg)
            self.output.truncate_log(state["log_lines"])
            for prefix, target in (("steps.", self.runner), ("best.", self.best)):
                target.load({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for name, error in state["failed"].items():
            self.failed[name] = self.job.rows.failed[name] = error
        self.output.write_failed(self.job.rows.failed)
        self.resumed += self.finished
        read = self.output.read_finished
        self.prefixes |= self.ranks.first(lambda: {n: read(n, about["digest"]) for n, about in self.finished.items()})
        return True


def note_failure(job: TrainJob, output: OutputDir, name: str, error: str) -> None:
    """Report a prefix that ends without a result.

    Args:
        job: Training job.
        output: Output folder and store.
        name: Name of the prefix.
        error: Error message.
    """
    logger.warning("prefix %r failed: %s", name, error)
    job.rows.failed[name] = error
    output.write_failed(job.rows.failed)
    job.callbacks.call("on_prefix_failed", name, error)
