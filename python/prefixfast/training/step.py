"""One optimizer step, or one evaluation, of all prefixes of a group in packed forward passes.

Every prefix has its own loss, learning rate, gradient clipping and update.

Shape letters: n prefixes, T target tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.data.encode import Ints
from prefixfast.io.progress import Progress
from prefixfast.model.base import Model
from prefixfast.training.batching import BatchOrder, MicroBatch, Share, micro_batches
from prefixfast.training.examples import Examples
from prefixfast.training.groups import PrefixGroup
from prefixfast.training.method import METHODS
from prefixfast.training.methods.state import MethodState
from prefixfast.training.optimizer import PrefixAdamW, learning_rates
from prefixfast.training.prefix_tensor import PrefixTensor
from prefixfast.training.ranks import ALONE, Ranks
from prefixfast.training.resilience import TokenBudget


class StepResult(NamedTuple):
    """Result of an optimizer step.

    Attributes:
        active: Prefixes that took the step, bool ``[n]``.
        losses: Training losses, fp64 ``[n]``.
        grad_norms: Gradient norms, fp64 ``[n]``.
        updated: Prefixes whose parameters were updated, bool ``[n]``.
    """

    active: Tensor
    losses: Tensor
    grad_norms: Tensor
    updated: Tensor


@dataclass(frozen=True)
class GroupExamples:
    """Training examples of a group.

    Attributes:
        examples: Examples of all prefixes.
        spans: First example and end of the examples of each prefix, int64 ``[n, 2]``.
    """

    examples: Examples
    spans: NDArray[np.int64]


class StepRunner:
    """Parameters, optimizer and examples of the n prefixes of a group.

    Args:
        model: Base model.
        group: Prefixes with resolved options.
        params: Parameters of the method.
        data: Training examples.
        ranks: Processes that divide the examples of each step.

    Attributes:
        num_taken: Number of examples of the last step.
        num_tokens: Number of tokens of the examples of the last step.
    """

    def __init__(
        self,
        model: Model,
        group: PrefixGroup,
        params: MethodState,
        data: GroupExamples,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks, self.share = ranks, Share(ranks.rank, ranks.size, group.config.shard_base)
        self.model, self.config, self.examples = model, group.config, data.examples
        self.num_prefixes = len(group.jobs)
        configs = [job.config for job in group.jobs]
        self.order = BatchOrder.draw(data.spans, configs)
        self.total = torch.from_numpy(self.order.total)
        if not METHODS[group.method_config.method].is_trained:
            self.total = torch.zeros_like(self.total)
        self.params = params
        decay = _vector([c.weight_decay for c in configs])
        self.optimizer = PrefixAdamW(self.params.params, self.num_prefixes, weight_decay=decay)
        self.peak = _vector([j.learning_rate for j in group.jobs])
        self.warmup = _vector([c.warmup_steps for c in configs])
        self.max_norm = _vector([c.max_grad_norm for c in configs])
        kinds = [c.lr_scheduler_type for c in configs]
        self.schedules = {kind: torch.tensor([k == kind for k in kinds]) for kind in set(kinds)}
        self.budget = TokenBudget(group.config.token_budget, model, can_repeat=not group.config.shard_base)
        self.num_taken = self.num_tokens = 0

    def step(self, number: int, active: Tensor) -> StepResult:
        """Take one optimizer step of every active prefix that has the step.

        Args:
            number: Number of the step, from 0.
            active: Prefixes that are still trained, bool ``[n]``.

        Raises:
            CapacityError: If memory runs out on a single example, or with an explicit token budget.
        """
        losses = self.budget.run(lambda: self._compute_gradients(number, active))
        if self.ranks.size > 1:
            params = [p.tensor for p in self.params.params]
            self.ranks.sum_([losses, *(_with_gradient(p) for p in params)])
        now = active & (number < self.total)
        done = torch.full_like(self.total, number)
        rate = torch.zeros(self.num_prefixes, dtype=torch.float64)
        for kind, whose in self.schedules.items():
            rate[whose] = learning_rates(done, self.total, peak=self.peak, warmup=self.warmup, kind=kind)[whose]
        rate, is_active, max_norm = torch.stack([rate, now.double(), self.max_norm]).to(self.model.device)
        norms, updated = torch.stack(self.optimizer.step(rate, is_active.bool(), max_norm)).cpu()
        return StepResult(now, losses, norms, updated.bool())

    @torch.no_grad()
    def first_losses(self) -> Tensor:
        """Losses of the examples of the first step, fp64 ``[n]``, of a method without steps."""
        losses = self.budget.run(lambda: self._batch_losses(0, torch.ones_like(self.total, dtype=torch.bool)))
        self.ranks.sum_([losses])
        return losses

    def _compute_gradients(self, number: int, active: Tensor) -> Tensor:
        """Compute the gradients of the parameters; returns the losses ``[n]``. A second call starts from scratch."""
        losses = self._batch_losses(number, active)
        self.params.backward()
        return losses

    def _batch_losses(self, number: int, active: Tensor) -> Tensor:
        """Losses ``[n]`` of the examples of a step, whose gradients flow back after each micro-batch."""
        chosen, prefix = self.order.at(number, active.numpy())
        self.params.refresh(np.full(self.num_prefixes, number, np.int64))
        losses = self._zeros()
        for micro in self._micro_batches(self.examples, chosen, prefix):
            weighted = self._token_losses(micro) * micro.weights.to(self.params.params[0].tensor.dtype)
            if torch.is_grad_enabled():
                weighted.sum().backward()
            losses.index_add_(0, micro.target_prefix, weighted.detach().double())
        self.num_taken, self.num_tokens = len(chosen), int(self.examples.sizes[chosen].sum())
        return losses.cpu()

    @torch.no_grad()
    def evaluate(self, data: GroupExamples, due: Tensor) -> Tensor:
        """Evaluate prefixes on held-out examples.

        Args:
            data: Held-out examples.
            due: Prefixes to evaluate, bool ``[n]``.

        Returns:
            Mean loss of a target token, fp64 ``[n]``, which counts where ``due`` is set.
        """

        def run() -> tuple[Tensor, Tensor]:
            self.params.refresh(np.zeros(self.num_prefixes, np.int64), dropout=False)
            numbers = due.nonzero()[:, 0].numpy()
            chosen = np.concatenate([np.arange(*data.spans[i]) for i in numbers])
            counts = [end - start for start, end in data.spans[numbers]]
            prefix = np.repeat(numbers, counts).astype(np.int32)
            total, count = self._zeros(), self._zeros()
            with Progress("evaluate", len(chosen), "examples") as work:
                for micro in self._micro_batches(data.examples, chosen, prefix):
                    losses = self._token_losses(micro).double()
                    if micro.is_filler:
                        continue
                    total.index_add_(0, micro.target_prefix, losses)
                    count.index_add_(0, micro.target_prefix, torch.ones_like(losses))
                    work.update(len(micro.lengths), tokens=micro.num_tokens)
            return total.cpu(), count.cpu()

        total, count = self.budget.run(run)
        self.ranks.sum_([total, count])
        return total / count

    def _micro_batches(self, examples: Examples, chosen: NDArray[np.int64], prefix: Ints) -> Iterator[MicroBatch]:
        is_sum, tokens, device = self.config.loss == "sequence_sum", self.budget.tokens, self.model.device
        how: dict[str, Any] = {"token_budget": tokens, "sequence_sum": is_sum, "device": device}
        return self.budget.watch(micro_batches(examples, chosen, prefix, **how, share=self.share))

    def _zeros(self) -> Tensor:
        """Sums of each prefix before the first micro-batch, fp64 ``[n]``, which stay on the device."""
        return torch.zeros(self.num_prefixes, dtype=torch.float64, device=self.model.device)

    def _token_losses(self, micro: MicroBatch) -> Tensor:
        """Cross-entropy of every target token, ``[T]``."""
        plan = self.params.plan(micro).with_logits_at(micro.logits_at)
        return self.model.losses(plan, micro.ids, micro.targets, micro.encoder_ids)

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state by name, for `load`."""
        own = {f"param.{i}": t.tensor for i, t in enumerate(self.params.params)}
        return own | {f"optimizer.{n}": t for n, t in self.optimizer.state().items()}

    def named(self) -> dict[str, PrefixTensor]:
        """Tensors of `state` that hold rows of prefixes, by their names there."""
        kinds = ("param", "optimizer.mean", "optimizer.square")
        return {f"{kind}.{i}": t for i, t in enumerate(self.params.params) for kind in kinds}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `state`."""
        for name, own in self.state().items():
            own.copy_(state[name])


def _with_gradient(param: Tensor) -> Tensor:
    """Gradient of a parameter, which is made if the examples of this process have given none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
