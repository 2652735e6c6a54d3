"""From examples to packed micro-batches: for every step index arithmetic over all active prefixes at once.

Shape letters: X examples of the run, n prefixes, N packed tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast import _rust
from prefixfast.config import TrainConfig
from prefixfast.data.encode import Ints
from prefixfast.training.dataset import Examples


@dataclass(frozen=True)
class Order:
    """Which examples each optimizer step of each prefix takes; drawn per prefix, as if it were alone.

    Attributes:
        examples: int64, example numbers, steps one after another, prefixes one after another.
        step_indptr: int64: step j (counted over all prefixes) takes ``examples[step_indptr[j]:step_indptr[j + 1]]``.
        first_step: int64 ``[n + 1]``: steps of prefix i are ``first_step[i]`` to ``first_step[i + 1]``.
    """

    examples: NDArray[np.int64]
    step_indptr: NDArray[np.int64]
    first_step: NDArray[np.int64]

    @classmethod
    def draw(cls, spans: NDArray[np.int64], configs: Sequence[TrainConfig]) -> Order:
        """The whole run's order: epochs of ``batch_size`` examples, the last batch of an epoch may be smaller.

        Args:
            spans: int64 ``[n, 2]``: prefix i learns from the examples from ``spans[i, 0]`` to before ``spans[i, 1]``; prefixes may share them.
            configs: Of each prefix.
        """
        chosen, sizes, steps = [], [], []
        for (start, end), config in zip(spans, configs, strict=True):
            count = int(end - start)
            per_epoch = -(-count // config.batch_size)
            total = config.max_steps or max(1, round(per_epoch * config.num_train_epochs))
            for epoch in range(-(-total // per_epoch)):
                order = (
                    np.random.default_rng([config.seed, epoch]).permutation(count)
                    if config.shuffle
                    else np.arange(count)
                )
                batches = min(per_epoch, total - epoch * per_epoch)
                chosen.append(start + order[: batches * config.batch_size])
                sizes += [min(config.batch_size, count - b * config.batch_size) for b in range(batches)]
            steps.append(total)
        return cls(
            np.concatenate(chosen), np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([[0], np.cumsum(steps)])
        )

    @property
    def total(self) -> NDArray[np.int64]:
        """int64 ``[n]``: optimizer steps of each prefix."""
        return np.diff(self.first_step)

    def at(self, step: int, active: NDArray[np.bool_] | None = None) -> tuple[NDArray[np.int64], Ints]:
        """Examples of the given step of every prefix that has one (and is active), and the prefix of each."""
        has = step < self.total
        prefixes = np.flatnonzero(has if active is None else has & active)
        j = self.first_step[prefixes] + step
        index = ragged(self.step_indptr[j], self.step_indptr[j + 1])
        return self.examples[index], np.repeat(prefixes, self.step_indptr[j + 1] - self.step_indptr[j]).astype(np.int32)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    Attributes:
        lengths: int32 ``[S]``: input tokens of each sequence (its last token, which is its last target, is no input).
        prefix: int32 ``[S]``: prefix of each sequence.
        ids: int64 ``[N]``.
        logits_at: int64 ``[T]``: input tokens whose next token is a target.
        targets: int64 ``[T]``.
        weights: fp64 ``[T]``: weight of each target token in the summed loss.
        target_prefix: int64 ``[T]``.
    """

    lengths: Ints
    prefix: Ints
    ids: Tensor
    logits_at: Tensor
    targets: Tensor
    weights: Tensor
    target_prefix: Tensor


def micro_batches(
    examples: Examples,
    chosen: NDArray[np.int64],
    prefix: Ints,
    *,
    token_budget: int,
    sequence_sum: bool,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Pack examples into forward passes of at most ``token_budget`` tokens; ``prefix`` is non-decreasing."""
    lengths = (examples.indptr[chosen + 1] - examples.indptr[chosen]).astype(np.int32)
    targets = examples.targets[chosen]
    packing = _rust.pack(lengths, targets, prefix, token_budget=token_budget, sequence_sum=sequence_sum)
    for a, b in zip(packing.micro_indptr[:-1], packing.micro_indptr[1:], strict=True):
        part = packing.order[a:b]
        begin, end, count = examples.indptr[chosen[part]], examples.indptr[chosen[part] + 1], targets[part]
        inputs = (end - begin - 1).astype(np.int32)
        offset = np.cumsum(inputs, dtype=np.int64) - inputs
        at = examples.target_at[ragged(examples.target_indptr[chosen[part]], examples.target_indptr[chosen[part] + 1])]
        yield MicroBatch(
            inputs,
            prefix[part],
            torch.from_numpy(examples.ids[ragged(begin, end - 1)].astype(np.int64)).to(device),
            torch.from_numpy(at - 1 + np.repeat(offset - begin, count)).to(device),
            torch.from_numpy(examples.ids[at].astype(np.int64)).to(device),
            torch.from_numpy(np.repeat(packing.weight[part], count)).to(device),
            torch.from_numpy(np.repeat(prefix[part], count).astype(np.int64)).to(device),
        )


def ragged(begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of ``arange(begin[i], end[i])``."""
    count = end - begin
    return np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(count.sum())
