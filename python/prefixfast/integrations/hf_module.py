"""`PrefixModule`, the parameters of a prefix as the module that transformers' `Trainer` trains, and its batches.

Shape letters: b examples of a batch, T target tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from prefixfast.model.base import Model
from prefixfast.training.batching import epoch_order, micro_batches
from prefixfast.training.examples import Examples
from prefixfast.training.methods.state import MethodState


class ExampleNumbers(Dataset[int]):
    """Numbers of examples as a data set."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> int:
        return self.numbers[i]


class EpochSampler(Sampler[int]):
    """Order of the examples of each epoch, which is that of `train`."""

    def __init__(self, count: int, seed: int, *, shuffle: bool) -> None:
        self.count, self.seed, self.shuffle, self.epoch = count, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.count, self.seed, self.epoch, shuffle=self.shuffle).tolist())


class PrefixModule(nn.Module):
    """Parameters of a prefix, which share the memory of its state, with the loss as forward pass.

    Args:
        model: Base model, which is no submodule.
        state: State of the prefix.
        examples: Training examples, and behind them the held-out ones.
    """

    accepts_loss_kwargs = True  # the Trainer gives the number of target tokens of a step

    def __init__(self, model: Model, state: MethodState, examples: Examples) -> None:
        super().__init__()
        self.base, self.state, self.examples = model, state, examples
        self.owned = [nn.Parameter(t.tensor.detach()) for t in state.params]
        for i, parameter in enumerate(self.owned):
            self.register_parameter(f"param_{i}", parameter)

    def forward(self, examples: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> dict[str, Tensor]:
        """Summed cross-entropy of the target tokens of some examples, divided by the number of those of the step.

        Args:
            examples: Numbers of the examples, int64 ``[b]``.
            labels: Target tokens of the examples, int64 ``[T]``, which are counted.
            num_items_in_batch: Number of target tokens of all batches of the step, None for those of this batch.
        """
        chosen = examples.cpu().numpy()
        budget, prefix = int(self.examples.sizes[chosen].sum()), np.zeros(len(chosen), np.int32)
        (micro,) = micro_batches(
            self.examples, chosen, prefix, token_budget=budget, sequence_sum=False, device=self.base.device
        )
        plan = self.state.plan(micro).with_logits_at(micro.logits_at)
        losses = self.base.losses(plan, micro.ids, micro.targets, micro.encoder_ids)
        return {"loss": losses.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)}

    def collect_gradients(self) -> None:
        """Carry the gradients of the keys and values to the parameters of the module."""
        self.state.backward()
        for own, t in zip(self.owned, self.state.params, strict=True):
            own.grad = t.tensor.grad


@dataclass(frozen=True)
class Collator:
    """Numbers and target tokens of the examples of a batch."""

    examples: Examples

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of `PrefixModule.forward`, ``examples`` ``[b]`` and ``labels`` ``[T]``."""
        indptr = self.examples.target_indptr
        targets = [self.examples.ids[self.examples.target_at[indptr[i] : indptr[i + 1]]] for i in numbers]
        return {
            "examples": torch.tensor(numbers),
            "labels": torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        }
