"""Rows, prompts and targets as token ids: the one place that calls the tokenizer for training, requests, scores, `Prefix.inspect` and `Prefix.from_text`.

Prompt and target are tokenized apart, so that training sees the prompt as generation does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefixfast.data.formats import chat_options, chat_text, conversation, text
from prefixfast.data.rows import Row, row_error
from prefixfast.data.tasks import Task
from prefixfast.errors import ConfigError, DataError, RequestError
from prefixfast.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prefixfast.model.base import Model

Ints = NDArray[np.int32]
Input = str | Sequence[int] | Mapping[str, Any]


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


def encode_examples(tokenizer: Tokenizer | None, vocab_size: int, rows: Sequence[Row], task: Task) -> Iterator[Example]:
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
def request_error(index: int) -> Iterator[None]:
    """Raise errors of one row as a `RequestError` of its request."""
    try:
        yield
    except (DataError, ConfigError) as e:
        msg = f"request {index}: {str(e).removeprefix('row 0: ')}"
        raise RequestError(msg, index=index) from e


def encode_prompts(model: Model, batch: Sequence[Input], tasks: Sequence[Task]) -> list[Ints]:
    """Token ids of the prompt of each request; rows of one task are linearized and tokenized together.

    Args:
        model: Base model.
        batch: Strings, lists of token ids, or rows. The target of a row is not read.
        tasks: Task of each request. Requests of one task share one object.

    Returns:
        Token ids of each prompt, int32, at least one.

    Raises:
        RequestError: For a prompt that is no text, has no tokens, or has ids outside the vocabulary.
        ConfigError: If the base has no tokenizer and a request needs one.
    """
    texts = {i: item for i, item in enumerate(batch) if isinstance(item, str)}
    chats: dict[int, str] = {}  # the chat template writes the special tokens of these
    by_task: dict[int, list[int]] = {}
    for i, (item, task) in enumerate(zip(batch, tasks, strict=True)):
        if isinstance(item, Mapping) and "input_ids" not in item:
            by_task.setdefault(id(task), []).append(i)
    for numbers in by_task.values():
        task = tasks[numbers[0]]
        for i, prompt in zip(numbers, _prompts(task, batch, numbers, model.require_tokenizer()), strict=True):
            item = batch[i]
            (chats if isinstance(item, Mapping) and task.is_chat(item) else texts)[i] = prompt
    out: dict[int, Ints] = {}
    for group in (texts, chats):
        for i, prompt in group.items():
            _check_unicode(prompt, i)
        if group:
            encoded = model.require_tokenizer().encode(list(group.values()), add_special_tokens=group is texts)
            out |= zip(group, encoded, strict=True)
    for i, item in enumerate(batch):
        if i not in out:
            given = item["input_ids"] if isinstance(item, Mapping) else item
            found = token_ids(given, model.vocab_size)
            if found is None:
                last = model.vocab_size - 1
                msg = (
                    f"request {i}: expected a string, a list of token ids from 0 to {last}, or a row, got {given!r:.80}"
                )
                raise RequestError(msg, index=i)
            out[i] = found
        if not len(out[i]):
            msg = f"request {i}: the prompt has no tokens"
            raise RequestError(msg, index=i)
    return [out[i] for i in range(len(batch))]


def encode_target(model: Model, target: str | Sequence[int], index: int) -> Ints:
    """Token ids of a target, int32, without an end token.

    Args:
        model: Base model.
        target: String, or token ids that are taken as they are.
        index: Number of the request, for errors.

    Raises:
        RequestError: For a target that is no text, or has ids outside the vocabulary.
    """
    if isinstance(target, str):
        _check_unicode(target, index, "target")
        return model.require_tokenizer().encode([target], add_special_tokens=False)[0]
    found = token_ids(target, model.vocab_size)
    if found is None:
        last = model.vocab_size - 1
        msg = f"request {index}: target: expected a string or a list of token ids from 0 to {last}, got {target!r:.80}"
        raise RequestError(msg, index=index)
    return found


def encode_text(model: Model, source: str | Sequence[int] | Sequence[Mapping[str, Any]]) -> Ints:
    """Token ids of a whole text.

    Args:
        model: Base model.
        source: String, tokenized as a prompt is; token ids, taken as they are; or chat messages, written by the chat
            template without its generation prompt.

    Returns:
        Token ids, int32, at least one.

    Raises:
        ConfigError: For anything else, a text without tokens, or messages that the chat template refuses.
    """
    if isinstance(source, str):
        ids = model.require_tokenizer().encode([source])[0]
    elif isinstance(source, Sequence) and source and all(isinstance(m, Mapping) for m in source):
        ids = _chat_ids(model.require_tokenizer(), source)
    elif (found := token_ids(source, model.vocab_size)) is not None:
        ids = found
    else:
        last = model.vocab_size - 1
        msg = f"text: expected a string, token ids from 0 to {last}, or messages {{'role', 'content'}}, got {source!r:.80}"
        raise ConfigError(msg)
    if not len(ids):
        msg = f"text: expected at least one token, got {source!r:.80}"
        raise ConfigError(msg)
    return ids


def token_ids(value: object, vocab_size: int) -> Ints | None:
    """A flat sequence of token ids as an int32 array; None if ``value`` is something else or an id is out of range."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return None
    if not isinstance(value, np.ndarray) and not all(
        issubclass(kind, int | np.integer) and kind is not bool for kind in set(map(type, value))
    ):
        return None
    try:
        ids = np.asarray(value) if len(value) else np.zeros(0, np.int32)
    except OverflowError:  # beyond 64 bits
        return None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and (ids.min() < 0 or ids.max() >= vocab_size)):
        return None
    return ids.astype(np.int32)


def _prompts(task: Task, batch: Sequence[Any], numbers: list[int], tokenizer: Tokenizer) -> list[str]:
    try:
        return task.prompts([batch[i] for i in numbers], tokenizer.eos, tokenizer.chat)
    except (DataError, ConfigError):
        for i in numbers:  # find the request that is wrong
            with request_error(i):
                task.prompts([batch[i]], tokenizer.eos, tokenizer.chat)
        raise


def _check_unicode(value: str, index: int, what: str = "") -> None:
    try:
        value.encode()
    except UnicodeEncodeError as e:
        msg = f"request {index}: target: it is no text: {e}" if what else f"request {index}: the prompt is no text: {e}"
        raise RequestError(msg, index=index) from e


def _chat_ids(tokenizer: Tokenizer, messages: Sequence[Any]) -> Ints:
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or "content" not in message:
            msg = f"text: message {i}: expected 'role' and 'content', got the keys {sorted(map(str, message))}"
            raise ConfigError(msg)
    if not getattr(tokenizer.hf, "chat_template", None):
        msg = "text: this tokenizer has no chat template; give a string, or load(model, tokenizer=...) one that has"
        raise ConfigError(msg)
    try:
        written = tokenizer.chat(messages, generation_prompt=False)
        return tokenizer.encode([written], add_special_tokens=False)[0]
    except Exception as e:  # a template is a program: it can raise anything
        msg = f"text: the chat template refuses these messages: {e}"
        raise ConfigError(msg) from e
