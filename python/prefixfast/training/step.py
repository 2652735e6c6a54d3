"""One optimizer step, or one evaluation, of all prefixes of a group at once: packed forwards, each prefix's own loss, rate, clipping and update.

Shape letters: n prefixes, T target tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.attention.plan import prefix_rows, training_plan
from prefixfast.config import PrefixConfig
from prefixfast.model.base import Model
from prefixfast.model.text_kv import parameter_dtype
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.batching import MicroBatch, Order, micro_batches
from prefixfast.training.dataset import Examples
from prefixfast.training.groups import Group
from prefixfast.training.optimizer import PrefixAdamW, learning_rates
from prefixfast.training.parameters import PrefixParameters
from prefixfast.training.resilience import TokenBudget

DEFAULT_RATE = {"none": 5e-2, "mlp": 1e-3}


class Taken(NamedTuple):
    """What a step did, ``[n]`` each: who took it, losses, gradient norms (fp64), and whose parameters were updated."""

    now: Tensor
    losses: Tensor
    norms: Tensor
    updated: Tensor


class Steps:
    """Parameters, optimizer and data of n prefixes.

    Args:
        model: The base.
        group: The prefixes and what they share.
        config: What is learned, lengths settled.
        start: Of each prefix keys and values by layer, None: random.
        windows: Of each prefix ``"slide"`` or ``"always"``.
        examples: Of all prefixes.
        spans: int64 ``[n, 2]``: each prefix's examples.
        on_top_of: A frozen prefix that every sequence attends to before its own.
    """

    def __init__(
        self, model: Model, group: Group, config: PrefixConfig, start: Sequence[Any], windows: Sequence[str], examples: Examples, spans: NDArray[np.int64],
        on_top_of: Prefix | None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.examples, self.num_prefixes = model, group.config, examples, len(start)
        configs = [m.config for m in group.members]
        self.order = Order.draw(spans, configs)
        self.total = torch.from_numpy(self.order.total)
        dtype = parameter_dtype(model.dtype)
        base = () if on_top_of is None else kv_by_layer(on_top_of, model.layers)
        seeds = [c.seed for c in configs]
        self.params = PrefixParameters.make(
            model.layers, start, config, mlp=group.mlp, seed=seeds, dtype=dtype, device=model.device, on_top_of=base
        )
        self.optimizer = PrefixAdamW(
            self.params.params, len(start), weight_decay=_vector([c.weight_decay for c in configs])
        )
        default = DEFAULT_RATE["mlp" if group.mlp else "none"]
        self.peak = _vector([c.learning_rate or default for c in configs])
        self.warmup = _vector([c.warmup_steps for c in configs])
        self.max_norm = _vector([c.max_grad_norm for c in configs])
        self.schedules = {
            kind: torch.tensor([c.lr_scheduler_type == kind for c in configs])
            for kind in {c.lr_scheduler_type for c in configs}
        }
        self.budget = TokenBudget(group.config.token_budget)
        rows = [
            (self.params.layers, config.length, config.length if config.pos_start == "after" else 0, w == "slide")
            for w in windows
        ]
        if on_top_of is not None:
            rows.append((on_top_of.layers, on_top_of.length, on_top_of.pos_start, on_top_of.window == "slide"))
        self.prefix_rows = prefix_rows(rows, len(model.layers))
        self.composed = on_top_of is not None

    def take(self, step: int, active: Tensor) -> Taken:
        """The given optimizer step of every active prefix that has one."""
        losses = self.budget.run(lambda: self._gradients(step, active))
        now = active & (step < self.total)
        rate = torch.zeros(self.num_prefixes, dtype=torch.float64)
        for kind, whose in self.schedules.items():
            rate[whose] = learning_rates(
                torch.full_like(self.total, step), self.total, peak=self.peak, warmup=self.warmup, kind=kind
            )[whose]
        device = self.model.device
        norms, updated = self.optimizer.step(rate.to(device), now.to(device), self.max_norm)
        return Taken(now, losses, norms.cpu(), updated.cpu())

    def _gradients(self, step: int, active: Tensor) -> Tensor:
        """Loss of each prefix ``[n]``; the gradients are in the parameters. May be called again after a failure."""
        chosen, prefix = self.order.at(step, active.numpy())
        self.params.refresh(np.full(self.num_prefixes, step, np.int64))
        losses = torch.zeros(self.num_prefixes, dtype=torch.float64)
        for micro in self._packed(self.examples, chosen, prefix):
            weighted = self._losses(micro) * micro.weights.to(self.params.params[0][0].dtype)
            weighted.sum().backward()
            losses.index_add_(0, micro.target_prefix.cpu(), weighted.detach().double().cpu())
        self.params.backward()
        return losses

    @torch.no_grad()
    def evaluate(self, examples: Examples, spans: NDArray[np.int64], due: Tensor) -> Tensor:
        """Mean loss of a target token, fp64 ``[n]``, of the prefixes that are due (bool ``[n]``) on their examples."""

        def run() -> Tensor:
            self.params.refresh(np.zeros(self.num_prefixes, np.int64), dropout=False)
            numbers = due.nonzero()[:, 0].numpy()
            chosen = np.concatenate([np.arange(*spans[i]) for i in numbers])
            prefix = np.repeat(numbers, [end - start for start, end in spans[numbers]]).astype(np.int32)
            total, count = (torch.zeros(self.num_prefixes, dtype=torch.float64) for _ in range(2))
            for micro in self._packed(examples, chosen, prefix):
                where = micro.target_prefix.cpu()
                total.index_add_(0, where, self._losses(micro).double().cpu())
                count.index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
            return total / count

        return self.budget.run(run)

    def _packed(self, examples: Examples, chosen: NDArray[np.int64], prefix: NDArray[np.int32]) -> Any:
        sums = self.config.loss == "sequence_sum"
        packed = micro_batches(
            examples, chosen, prefix, token_budget=self.budget.tokens, sequence_sum=sums, device=self.model.device
        )
        return self.budget.watch(packed)

    def _losses(self, micro: MicroBatch) -> Tensor:
        """Cross-entropy of every target token ``[T]``."""
        count, used = len(micro.lengths), micro.prefix
        if (
            self.composed
        ):  # left to right: the frozen prefix, whose rows are the last in the leaves, then the sequence's own
            used = np.stack([np.full_like(used, self.num_prefixes), used], 1).reshape(-1)
        indptr = np.arange(count + 1, dtype=np.int32) * (2 if self.composed else 1)
        plan = training_plan(
            micro.lengths,
            indptr,
            used,
            self.prefix_rows,
            self.params.leaves,
            backend=self.model.backend,
            device=self.model.device,
        )
        return self.model.losses(plan.with_logits_at(micro.logits_at), micro.ids, micro.targets)

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer by name, to be saved; what `load` takes."""
        own = {f"param.{i}": t for i, (t, _) in enumerate(self.params.params)}
        return own | {f"optimizer.{n}": t for n, t in self.optimizer.state().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, own in self.state().items():
            own.copy_(state[name])


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
