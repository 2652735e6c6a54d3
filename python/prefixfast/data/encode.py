"""Rows as tokenized examples: ids of every row of every prefix, ragged, and which of them are targets.

Shape letters: X examples of the run, n prefixes, A target tokens of the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefixfast.config import TrainConfig
from prefixfast.data.formats import chat_options, chat_text, conversation, text
from prefixfast.data.rows import Row, row_error
from prefixfast.data.tasks import Task
from prefixfast.errors import ConfigError, DataError
from prefixfast.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prefixfast.model.base import Model

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Examples:
    """Tokenized examples of all prefixes, ragged.

    Attributes:
        ids: int32, example x is ``[indptr[x]:indptr[x + 1]]`` and ends with its last target.
        indptr: int64 ``[X + 1]``.
        targets: int32 ``[X]``: target tokens of each example, at least 1.
        target_at: int64 ``[A]``: places in ``ids`` of the target tokens, ascending; never an example's first token.
        first: int64 ``[n + 1]``: examples of prefix i are ``first[i]`` to ``first[i + 1]``.
        skipped: Rows left out by ``overflow="skip"``.
        truncated: Rows cut by ``overflow="truncate"``.
    """

    ids: Ints
    indptr: NDArray[np.int64]
    targets: Ints
    target_at: NDArray[np.int64]
    first: NDArray[np.int64]
    skipped: int = 0
    truncated: int = 0

    @property
    def lengths(self) -> Ints:
        """int32 ``[X]``."""
        return np.diff(self.indptr).astype(np.int32)

    @cached_property
    def target_indptr(self) -> NDArray[np.int64]:
        """int64 ``[X + 1]``: targets of example x are ``target_at[target_indptr[x]:target_indptr[x + 1]]``."""
        return np.concatenate([[0], np.cumsum(self.targets, dtype=np.int64)])


class Example(NamedTuple):
    """One example.

    Attributes:
        ids: int32.
        targets: int64, places of its targets in ``ids``, ascending, from 1 on.
        row: Number of its row.
        whole: Every token from the row's first is a target, so that it may lose its end but has no prompt to lose.
    """

    ids: Ints
    targets: NDArray[np.int64]
    row: int
    whole: bool = False


def tokenize(
    model: Model, rows_of: Mapping[str, Sequence[Row]], task: Task, config: TrainConfig, limit: int
) -> Examples:
    """Tokenize the rows of every prefix.

    Args:
        model: For its tokenizer.
        rows_of: Rows by prefix name, in the order of the prefixes.
        task: How rows are read; rows with ``input_ids`` and ``labels`` (-100: no target) are taken as they are.
        config: ``overflow``.
        limit: Longest example in tokens.

    Raises:
        DataError: For a malformed or too long row, with prefix, and file and line or row number.
    """
    found: list[Example] = []
    first, skipped, truncated = [0], 0, 0
    for name, rows in rows_of.items():
        with _named(name):
            tokenizer = None if "input_ids" in rows[0] else model.require_tokenizer()
            for example in row_examples(tokenizer, model.vocab_size, rows, task):
                kept = fit(example, limit, config.overflow)
                if kept is None and config.overflow == "error":
                    msg = f"{len(example.ids)} tokens, at most {limit} fit; shorten it, raise max_length, or set overflow='truncate' or 'skip'"
                    raise row_error(rows[example.row], example.row, msg)
                skipped += kept is None
                truncated += kept is not None and kept is not example
                found += [] if kept is None else [kept]
        if len(found) == first[-1]:
            msg = f"prefix {name!r}: no rows are left (overflow={config.overflow!r} left out {skipped})"
            raise DataError(msg)
        first.append(len(found))
    indptr = np.concatenate([[0], np.cumsum([len(e.ids) for e in found], dtype=np.int64)])
    counts = np.array([len(e.targets) for e in found], np.int32)
    target_at = np.concatenate([e.targets for e in found]) + np.repeat(indptr[:-1], counts)
    return Examples(
        np.concatenate([e.ids for e in found]), indptr, counts, target_at, np.array(first, np.int64), skipped, truncated
    )


def fit(example: Example, limit: int, overflow: Literal["error", "truncate", "skip"]) -> Example | None:
    """The example if it has at most ``limit`` tokens, what ``truncate`` leaves of it, or None.

    Cut is the start of the prompt, so far that one token stays before the first target; a text without a prompt loses its end.
    """
    excess = len(example.ids) - limit
    if excess <= 0:
        return example
    if overflow != "truncate":
        return None
    if example.whole:
        targets = example.targets[example.targets < limit]
        return Example(example.ids[:limit], targets, example.row, True) if len(targets) else None
    return Example(example.ids[excess:], example.targets - excess, example.row) if excess < example.targets[0] else None


def row_examples(tokenizer: Tokenizer | None, vocab_size: int, rows: Sequence[Row], task: Task) -> Iterator[Example]:
    """The examples of rows, in order: one for each reference of a row.

    Prompt and target are tokenized apart, as generation sees the prompt. The end token follows a target that does not end with it, and a conversation's answer
    that the chat template closes with no special token. A ``text`` is the target from its second token on, as in TRL: the first has no token before it.

    Args:
        tokenizer: None only for rows with ``input_ids``.
        vocab_size: For the check of such rows.
        rows: At least one; with ``input_ids`` all of them or none.
        task: How they are read.

    Raises:
        DataError: For a malformed row.
        ConfigError: For a chat template that lacks what the task's ``loss_on`` asks for.
    """
    if "input_ids" in rows[0]:
        yield from (_given(row, i, vocab_size) for i, row in enumerate(rows))
        return
    assert tokenizer is not None
    if task.format == "text":
        ids = tokenizer.encode([text(row, i, "text") for i, row in enumerate(rows)])
        eos = tokenizer.eos_id
        for i, (row, own) in enumerate(zip(rows, ids, strict=True)):
            yield _after(row, i, _ended(own, eos), 1, whole=True)
    elif task.format == "messages" and (
        task.loss_on in ("assistant", "all") or (task.loss_on == "auto" and tokenizer.marks_answers)
    ):
        yield from (_turns(tokenizer, row, i, everything=task.loss_on == "all") for i, row in enumerate(rows))
    else:
        yield from _pairs(tokenizer, rows, task)


def _pairs(tokenizer: Tokenizer, rows: Sequence[Row], task: Task) -> Iterator[Example]:
    pairs = task.pairs(rows, tokenizer.eos, tokenizer.chat)
    chats = [task.is_chat(row) for row in rows]
    prompts: dict[int, Ints] = {}
    for chat in {*chats}:  # the chat template has written the special tokens already
        mine = [i for i, c in enumerate(chats) if c == chat]
        prompts |= zip(mine, tokenizer.encode([pairs[i][0] for i in mine], add_special_tokens=not chat), strict=True)
    eos = tokenizer.eos_id
    targets = iter(tokenizer.encode([t for _, ts in pairs for t in ts], add_special_tokens=False))
    for i, (row, (_, ts)) in enumerate(zip(rows, pairs, strict=True)):
        prompt = prompts[i]
        if not len(prompt):
            raise row_error(row, i, "the prompt has no tokens; the first target token needs one before it")
        for _ in ts:
            target = next(targets)
            closed = chats[i] and not tokenizer.special_ids.isdisjoint(target.tolist())
            yield _after(row, i, np.concatenate([prompt, target if closed else _ended(target, eos)]), len(prompt))


def _turns(tokenizer: Tokenizer, row: Row, number: int, *, everything: bool) -> Example:
    """A whole conversation, of which the assistant's turns are the target, or everything."""
    context, answer = conversation(row, number)
    history = context + answer
    if everything:
        whole = chat_text(row, number, tokenizer.chat, history, generation_prompt=False)
        (ids,) = tokenizer.encode([whole], add_special_tokens=False)
        return _after(row, number, ids, 1, whole=True)
    if not tokenizer.marks_answers:
        msg = "loss_on='assistant': the chat template does not mark the assistant's turns with {% generation %}; use 'last', or a template that does"
        raise ConfigError(msg)
    options = chat_options(row, number)
    try:
        ids, mask = tokenizer.chat_answers(history, **options)
    except DataError as e:
        raise row_error(row, number, str(e)) from e
    if mask.any() and mask[-1] and tokenizer.special_ids.isdisjoint(ids[mask].tolist()):
        ids = _ended(ids, tokenizer.eos_id)
        mask = np.concatenate([mask, np.ones(len(ids) - len(mask), bool)])
    return _marked(row, number, ids, mask)


def _ended(target: Ints, eos: int | None) -> Ints:
    """The target with the end token, unless it ends with it or there is none."""
    return target if eos is None or (len(target) and target[-1] == eos) else np.append(target, np.int32(eos))


def _after(row: Row, number: int, ids: Ints, start: int, *, whole: bool = False) -> Example:
    """An example whose targets are all tokens from ``start`` on."""
    return _example(row, number, ids, np.arange(start, len(ids)), whole)


def _marked(row: Row, number: int, ids: Ints, mask: NDArray[np.bool_], *, whole: bool = False) -> Example:
    """An example whose targets are marked, without what follows the last one; the first token can be none."""
    targets = 1 + np.flatnonzero(mask[1:])
    return _example(row, number, ids[: targets[-1] + 1] if len(targets) else ids, targets, whole)


def _example(row: Row, number: int, ids: Ints, targets: NDArray[np.int64], whole: bool) -> Example:
    if not len(targets):
        raise row_error(row, number, "expected at least one target token after the first token, got none")
    return Example(ids, targets, number, whole)


def _given(row: Row, number: int, vocab_size: int) -> Example:
    ids, labels = _array(row.get("input_ids")), _array(row.get("labels"))
    if (
        ids is None
        or labels is None
        or labels.shape != ids.shape
        or not len(ids)
        or ids.min() < 0
        or ids.max() >= vocab_size
    ):
        raise row_error(
            row, number, f"expected input_ids and labels, two lists of one length with token ids below {vocab_size}"
        )
    mask = labels != -100
    if not np.array_equal(labels[mask], ids[mask]):
        at = int(np.flatnonzero(mask & (labels != ids))[0])
        msg = f"labels: expected -100 or the id at the same place (the shift to the next token is made here), got {labels[at]} for {ids[at]} at {at}"
        raise row_error(row, number, msg)
    if not mask[1:].any():
        raise row_error(row, number, "labels: expected at least one target after the first token, got -100 everywhere")
    return _marked(row, number, ids.astype(np.int32), mask, whole=bool(mask[0]))


def _array(values: object) -> NDArray[np.int64] | None:
    """A flat integer array, or None for anything else."""
    try:
        found = np.asarray(values)
        return found.astype(np.int64) if found.ndim == 1 and found.dtype.kind in "iu" else None
    except (ValueError, OverflowError):  # ragged, or beyond 64 bits
        return None


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of rows say whose rows they are."""
    try:
        yield
    except DataError as e:
        msg = f"prefix {name!r}, {e}"
        raise DataError(msg, path=e.path, line=e.line) from e
