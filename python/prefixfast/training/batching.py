"""Packing of examples into micro-batches, by index arithmetic over all active prefixes at once.

Shape letters: X examples of the run, n prefixes, S sequences, N packed tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast import _rust
from prefixfast.config import TrainConfig
from prefixfast.data.encode import Ints
from prefixfast.errors import ConfigError
from prefixfast.training.defaults import num_steps
from prefixfast.training.examples import Examples

MAX_STEPS = 10**7  # the order of a whole run lies in memory


@dataclass(frozen=True)
class BatchOrder:
    """The examples of each optimizer step of each prefix, drawn for each prefix as if it were alone.

    Attributes:
        examples: Numbers of examples, int64, in the order of steps within a prefix and of prefixes.
        step_indptr: Offsets of the steps in ``examples``, int64. Step j, counted over all prefixes, takes the examples
            ``examples[step_indptr[j]:step_indptr[j + 1]]``.
        first_step: Offsets of the prefixes, int64 ``[n + 1]``. Prefix i has the steps ``first_step[i]`` to
            ``first_step[i + 1]``.
    """

    examples: NDArray[np.int64]
    step_indptr: NDArray[np.int64]
    first_step: NDArray[np.int64]

    @classmethod
    def draw(cls, spans: NDArray[np.int64], configs: Sequence[TrainConfig]) -> BatchOrder:
        """Draw the order of the whole run: epochs of ``batch_size`` examples, of which the last batch may be smaller.

        Args:
            spans: First example and end of the examples of each prefix, int64 ``[n, 2]``. Prefixes may share examples.
            configs: Options of each prefix.

        Raises:
            ConfigError: If the run has more steps than can be drawn.
        """
        chosen, sizes = [], []
        steps: list[int] = []
        for (start, end), config in zip(spans, configs, strict=True):
            count = int(end - start)
            per_epoch = -(-count // config.batch_size)
            total = num_steps(config, per_epoch)
            if sum(steps) + total > MAX_STEPS:
                option = "max_steps" if config.max_steps else "num_train_epochs"
                got = f"{option}={getattr(config, option)} gives a prefix {total} of them"
                msg = f"{option}: expected at most {MAX_STEPS} steps of all prefixes together, {got}"
                raise ConfigError(msg)
            for epoch in range(-(-total // per_epoch)):
                order = epoch_order(count, config.seed, epoch, shuffle=config.shuffle)
                batches = min(per_epoch, total - epoch * per_epoch)
                chosen.append(start + order[: batches * config.batch_size])
                sizes += [min(config.batch_size, count - b * config.batch_size) for b in range(batches)]
            steps.append(total)
        step_indptr, first_step = (np.concatenate([[0], np.cumsum(counts)]) for counts in (sizes, steps))
        return cls(np.concatenate(chosen), step_indptr, first_step)

    @property
    def total(self) -> NDArray[np.int64]:
        """Number of optimizer steps of each prefix, int64 ``[n]``."""
        return np.diff(self.first_step)

    def at(self, step: int, active: NDArray[np.bool_] | None = None) -> tuple[NDArray[np.int64], Ints]:
        """Examples of one step.

        Args:
            step: Number of the step, from 0.
            active: Prefixes that take the step if they have one, bool ``[n]``; None for all.

        Returns:
            Numbers of the examples, and the prefix of each example.
        """
        has = step < self.total
        prefixes = np.flatnonzero(has if active is None else has & active)
        j = self.first_step[prefixes] + step
        index = concat_ranges(self.step_indptr[j], self.step_indptr[j + 1])
        return self.examples[index], np.repeat(prefixes, self.step_indptr[j + 1] - self.step_indptr[j]).astype(np.int32)


def epoch_order(count: int, seed: int, epoch: int, *, shuffle: bool) -> NDArray[np.int64]:
    """Order of the examples of a prefix in an epoch.

    Args:
        count: Number of examples.
        seed: Random seed of the prefix.
        epoch: Number of the epoch, from 0.
        shuffle: Whether the order is drawn anew in every epoch.
    """
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass.

    Attributes:
        lengths: Number of input tokens of each sequence, int32 ``[S]``. The last token of an example, which is its last
            target, is no input.
        last_prompt_token: Index of the token before the first target of each sequence, int32 ``[S]``.
        prefix: Prefix of each sequence, int32 ``[S]``.
        ids: Token ids of the input, int64 ``[N]``.
        logits_at: Input tokens that are followed by a target, int64 ``[T]``.
        targets: Token ids of the targets, int64 ``[T]``.
        weights: Weight of each target token in the summed loss, fp64 ``[T]``.
        target_prefix: Prefix of each target token, int64 ``[T]``.
        encoder_lengths: Number of tokens of each sequence's source, int32 ``[S]``; None for a decoder-only base
            model.
        encoder_ids: Token ids of the sources, int64 ``[M]``, likewise.
        is_filler: Whether the result does not count, since the process has no examples left and runs in step with
            others.
    """

    lengths: Ints
    last_prompt_token: Ints
    prefix: Ints
    ids: Tensor
    logits_at: Tensor
    targets: Tensor
    weights: Tensor
    target_prefix: Tensor
    encoder_lengths: Ints | None = None
    encoder_ids: Tensor | None = None
    is_filler: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of input tokens, those of the encoder included."""
        return len(self.ids) + (0 if self.encoder_ids is None else len(self.encoder_ids))


@dataclass(frozen=True)
class Share:
    """The examples of a step that one of several processes takes.

    Attributes:
        rank: Number of the process, from 0.
        size: Number of processes.
        is_in_step: Whether all processes run the same number of forward passes.
    """

    rank: int = 0
    size: int = 1
    is_in_step: bool = False

    def indices(self, sizes: Ints, rank: int) -> NDArray[np.int64]:
        """Indices of the examples of a process, ascending. All processes get about the same number of tokens.

        Args:
            sizes: Number of tokens of each example, int32 ``[X]``.
            rank: Number of the process.
        """
        if self.size == 1:
            return np.arange(len(sizes))
        place = np.arange(len(sizes)) % (2 * self.size)  # from the largest to the smallest, forth and back
        owner = np.where(place < self.size, place, 2 * self.size - 1 - place)
        return np.sort(np.argsort(-sizes, kind="stable")[owner == rank])


EVERYTHING = Share()


def micro_batches(
    examples: Examples,
    chosen: NDArray[np.int64],
    prefix: Ints,
    *,
    token_budget: int,
    sequence_sum: bool,
    device: torch.device,
    share: Share = EVERYTHING,
) -> Iterator[MicroBatch]:
    """Pack examples into forward passes.

    Args:
        examples: All examples.
        chosen: Numbers of the examples to pack.
        prefix: Prefix of each chosen example, non-decreasing.
        token_budget: Largest number of tokens of a forward pass, those of an encoder included.
        sequence_sum: Whether the loss is the paper's sum over tokens and mean over rows, instead of the token mean.
        device: Device of the tensors.
        share: Examples of this process. The weights of target tokens are those among all chosen examples.
    """
    sizes, num_targets = examples.sizes[chosen], examples.num_targets[chosen]

    def pack(own: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
        found = _rust.pack(
            sizes[own], num_targets[own], prefix[own], token_budget=token_budget, sequence_sum=sequence_sum
        )
        return found.weight, np.split(own[found.order], found.micro_indptr[1:-1]) if len(own) else []

    weight, parts = pack(np.arange(len(chosen)))
    num_fillers = 0
    if share.size > 1:
        _, parts = pack(share.indices(sizes, share.rank))
        if share.is_in_step:
            counts = [len(pack(share.indices(sizes, rank))[1]) for rank in range(share.size)]
            num_fillers = max(counts) - len(parts)
    for number, part in enumerate([*parts, *[np.zeros(1, np.int64)] * num_fillers]):
        is_filler = number >= len(parts)
        own = chosen[part]
        begin, end, count = examples.indptr[own], examples.indptr[own + 1], num_targets[part]
        inputs = (end - begin - 1).astype(np.int32)
        offset = np.cumsum(inputs, dtype=np.int64) - inputs
        at = examples.target_at[concat_ranges(examples.target_indptr[own], examples.target_indptr[own + 1])]
        encoder_lengths, encoder_ids = _encoder_texts(examples, own)
        arrays = {
            "ids": examples.ids[concat_ranges(begin, end - 1)],
            "logits_at": at - 1 + np.repeat(offset - begin, count),
            "targets": examples.ids[at],
            "weights": np.repeat(weight[part] * (not is_filler), count),
            "target_prefix": np.repeat(prefix[part], count),
            **({} if encoder_ids is None else {"encoder_ids": encoder_ids}),
        }
        yield MicroBatch(
            lengths=inputs,
            last_prompt_token=(examples.target_at[examples.target_indptr[own]] - begin - 1).astype(np.int32),
            prefix=prefix[part],
            encoder_lengths=encoder_lengths,
            is_filler=is_filler,
            **_on_device(arrays, device),
        )


def _on_device(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Arrays as tensors on a device after one transfer, int64 and, for arrays of floating-point numbers, fp64."""
    dtypes = {name: np.float64 if array.dtype.kind == "f" else np.int64 for name, array in arrays.items()}
    parts = [array.astype(dtypes[name]).view(np.int64) for name, array in arrays.items()]
    tensors = torch.from_numpy(np.concatenate(parts)).to(device).split([len(part) for part in parts])
    kinds = {np.int64: torch.int64, np.float64: torch.float64}
    return {name: t.view(kinds[dtypes[name]]) for name, t in zip(arrays, tensors, strict=True)}


def _encoder_texts(examples: Examples, own: NDArray[np.int64]) -> tuple[Ints | None, Ints | None]:
    """Lengths and token ids of the sources of examples, None for a decoder-only base model."""
    if (indptr := examples.encoder_indptr) is None or examples.encoder_ids is None:
        return None, None
    begin, end = indptr[own], indptr[own + 1]
    return (end - begin).astype(np.int32), examples.encoder_ids[concat_ranges(begin, end)]


def concat_ranges(begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenation of the ranges ``arange(begin[i], end[i])``."""
    count = end - begin
    return np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(count.sum())
