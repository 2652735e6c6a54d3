"""From rows to packed micro-batches: examples once, then for every step index arithmetic over all active prefixes at once.

Shape letters: X examples of the run, n prefixes, N packed tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast import _rust
from prefixfast.config import TrainConfig
from prefixfast.data.rows import Row
from prefixfast.data.tasks import Task
from prefixfast.errors import DataError
from prefixfast.model import Model

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Examples:
    """Tokenized examples of all prefixes, ragged.

    Attributes:
        ids: int32, prompt and target of example x at ``[indptr[x]:indptr[x + 1]]``, the end token included.
        indptr: int64 ``[X + 1]``.
        targets: int32 ``[X]``: target tokens, the last ones of each example.
        first: int64 ``[n + 1]``: examples of prefix i are ``first[i]`` to ``first[i + 1]``.
        skipped: Rows left out by ``overflow="skip"``.
        truncated: Rows cut by ``overflow="truncate"``.
    """

    ids: Ints
    indptr: NDArray[np.int64]
    targets: Ints
    first: NDArray[np.int64]
    skipped: int = 0
    truncated: int = 0

    @property
    def lengths(self) -> Ints:
        """int32 ``[X]``."""
        return np.diff(self.indptr).astype(np.int32)


def tokenize(model: Model, rows_of: Mapping[str, Sequence[Row]], task: Task, config: TrainConfig, limit: int) -> Examples:
    """Tokenize the rows of every prefix.

    Args:
        model: For its tokenizer.
        rows_of: Rows by prefix name, in the order of the prefixes.
        task: How rows are read; rows with ``input_ids`` and ``labels`` (-100: no target) are taken as they are.
        config: ``overflow``.
        limit: Longest example in tokens.

    Raises:
        DataError: For a malformed or too long row, with prefix and row number.
    """
    pieces: list[tuple[Ints, int]] = []
    first, skipped, truncated = [0], 0, 0
    for name, rows in rows_of.items():
        for number, (ids, targets) in enumerate(_named(_examples(model, rows, task, name), name)):
            cut = ids
            if len(ids) > limit:
                if config.overflow == "error":
                    where = f"prefix {name!r}, example {number}"
                    msg = f"{where}: {len(ids)} tokens, at most {limit} fit; shorten it, raise max_length, or set overflow='truncate' or 'skip'"
                    raise DataError(msg, line=number + 1)
                if config.overflow == "skip" or targets >= limit:
                    skipped += 1
                    continue
                truncated += 1
                cut = ids[len(ids) - limit :]
            pieces.append((cut, targets))
        if len(pieces) == first[-1]:
            msg = f"prefix {name!r}: no rows are left (overflow='skip' left out {skipped})"
            raise DataError(msg)
        first.append(len(pieces))
    lengths = np.array([len(ids) for ids, _ in pieces], np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    counts = np.array([t for _, t in pieces], np.int32)
    return Examples(np.concatenate([ids for ids, _ in pieces]), indptr, counts, np.array(first, np.int64), skipped, truncated)


def _named(examples: Iterator[tuple[Ints, int]], name: str) -> Iterator[tuple[Ints, int]]:
    """Errors of rows say whose rows they are."""
    try:
        yield from examples
    except DataError as e:
        msg = str(e) if str(e).startswith("prefix ") else f"prefix {name!r}, {e}"
        raise DataError(msg, path=e.path, line=e.line) from e


def _examples(model: Model, rows: Sequence[Row], task: Task, name: str) -> Iterator[tuple[Ints, int]]:
    if "input_ids" in rows[0]:
        yield from (_given(row, i, name, model.vocab_size) for i, row in enumerate(rows))
        return
    tokenizer = model.need_tokenizer()
    texts = [task.targets(row, i) for i, row in enumerate(rows)]
    prompts = tokenizer.encode(task.prompts(rows, tokenizer.eos))
    targets = tokenizer.encode([t for ts in texts for t in ts], add_special_tokens=False)
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    at = 0
    for i, ts in enumerate(texts):
        if not len(prompts[i]):
            msg = f"prefix {name!r}, row {i}: the prompt has no tokens; the first target token needs one before it"
            raise DataError(msg, line=i + 1)
        for target in targets[at : at + len(ts)]:
            yield np.concatenate([prompts[i], target, end]), len(target) + len(end)
        at += len(ts)


def _given(row: Row, number: int, name: str, vocab_size: int) -> tuple[Ints, int]:
    ids = np.asarray(row.get("input_ids"))
    labels = np.asarray(row.get("labels", []))
    where = f"prefix {name!r}, row {number}"
    if ids.ndim != 1 or ids.dtype.kind != "i" or labels.shape != ids.shape or not len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
        msg = f"{where}: expected input_ids and labels, two lists of one length with token ids below {vocab_size}"
        raise DataError(msg, line=number + 1)
    targets = int((labels != -100).sum())
    if not 0 < targets < len(ids) or not np.array_equal(labels[len(ids) - targets :], ids[len(ids) - targets :]):
        msg = f"{where}: labels: expected -100 on the prompt and the ids themselves on the target, which ends the row"
        raise DataError(msg, line=number + 1)
    return ids.astype(np.int32), targets


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
                order = np.random.default_rng([config.seed, epoch]).permutation(count) if config.shuffle else np.arange(count)
                batches = min(per_epoch, total - epoch * per_epoch)
                chosen.append(start + order[: batches * config.batch_size])
                sizes += [min(config.batch_size, count - b * config.batch_size) for b in range(batches)]
            steps.append(total)
        return cls(np.concatenate(chosen), np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([[0], np.cumsum(steps)]))

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
        lengths: int32 ``[S]``: input tokens of each sequence (its last target is no input).
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
    examples: Examples, chosen: NDArray[np.int64], prefix: Ints, *, token_budget: int, sequence_sum: bool, device: torch.device
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
        yield MicroBatch(
            inputs,
            prefix[part],
            torch.from_numpy(examples.ids[ragged(begin, end - 1)].astype(np.int64)).to(device),
            torch.from_numpy(ragged(offset + inputs - count, offset + inputs)).to(device),
            torch.from_numpy(examples.ids[ragged(end - count, end)].astype(np.int64)).to(device),
            torch.from_numpy(np.repeat(packing.weight[part], count)).to(device),
            torch.from_numpy(np.repeat(prefix[part], count).astype(np.int64)).to(device),
        )


def ragged(begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of ``arange(begin[i], end[i])``."""
    count = end - begin
    return np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(count.sum())
