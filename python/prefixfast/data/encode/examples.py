"""Training rows as token ids with the places of the target tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from prefixfast.data.chat import chat_options, chat_text, split_conversation
from prefixfast.data.encode.example import Example
from prefixfast.data.encode.seq2seq import DecoderTokens, encode_seq2seq
from prefixfast.data.encode.token_ids import Ints, vocabulary_error
from prefixfast.data.encode.tokenized import check_has_targets, check_tokenized, tokenized_row
from prefixfast.data.row_values import text_value
from prefixfast.data.rows import Row, row_error
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError
from prefixfast.model.tokenizer import Tokenizer


def encode_examples(
    tokenizer: Tokenizer | None,
    vocab_size: int,
    rows: Sequence[Row],
    task: Task,
    *,
    append_eos: bool = True,
    decoder: DecoderTokens | None = None,
) -> Iterator[Example]:
    """Yield the examples of rows in order, one for each reference of a row.

    With ``append_eos`` the end token is appended to a target that does not end with it, and to the answer of a
    conversation that the chat template closes with no special token. All tokens of a row with ``text`` but the first
    are targets, as in TRL, since no token precedes the first.

    Args:
        tokenizer: Tokenizer; None is allowed only for rows that are read by their ``input_ids``.
        vocab_size: Number of rows of the embedding, against which all token ids are checked.
        rows: Rows, at least one. Either all of them have ``input_ids`` or none.
        task: Task of the rows.
        append_eos: Whether the end token follows a target that does not end with it.
        decoder: Tokens of the decoder of an encoder-decoder base model, None for a decoder-only one.

    Raises:
        DataError: If a row is malformed, or is none of an encoder-decoder base model.
        ConfigError: If the chat template lacks the marks that the task's ``loss_on`` needs.
    """
    if decoder is not None:
        yield from encode_seq2seq(tokenizer, vocab_size, decoder, rows, task, append_eos=append_eos)
        return
    if task.is_tokenized(rows[0]):
        yield from (_encode_ids(row, i, vocab_size) for i, row in enumerate(rows))
        return
    assert tokenizer is not None
    for example in _encode_texts(tokenizer, rows, task, append_eos=append_eos):
        if error := vocabulary_error(example.ids, vocab_size):
            raise row_error(rows[example.row], example.row, error)
        yield example


def check_examples(rows: Sequence[Row], task: Task) -> None:
    """Check the format of training rows as far as no base model is needed.

    Args:
        rows: Rows, at least one. Either all of them have ``input_ids`` or none.
        task: Task of the rows.

    Raises:
        DataError: If a row is malformed.
    """
    if task.is_tokenized(rows[0]):
        for i, row in enumerate(rows):
            check_has_targets(row, i)
            check_tokenized(row, i)
    elif not any(map(task.is_chat, rows)):
        task.pairs(rows, "")
    else:
        for i, row in enumerate(rows):
            if task.is_chat(row):
                split_conversation(row, i)
                chat_options(row, i)
            else:
                _check_pair(row, i, task)


def _check_pair(row: Row, number: int, task: Task) -> None:
    try:
        task.pairs([row], "")
    except DataError as e:
        raise (e if e.path is not None else row_error(row, number, str(e).removeprefix("row 0: "))) from e


def _encode_texts(tokenizer: Tokenizer, rows: Sequence[Row], task: Task, *, append_eos: bool) -> Iterator[Example]:
    """Examples of rows with texts or conversations, with token ids that the embedding may lack."""
    eos = tokenizer.eos_id if append_eos else None
    if task.format == "text":
        ids = tokenizer.encode([text_value(row, i, "text") for i, row in enumerate(rows)])
        for i, (row, own) in enumerate(zip(rows, ids, strict=True)):
            yield _targets_from(row, i, _append_eos(own, eos), 1, has_no_prompt=True)
    elif task.format == "messages" and (
        task.loss_on in ("assistant", "all") or (task.loss_on == "auto" and tokenizer.marks_answers)
    ):
        every = task.loss_on == "all"
        yield from (_encode_conversation(tokenizer, row, i, eos, all_tokens=every) for i, row in enumerate(rows))
    else:
        yield from _encode_pairs(tokenizer, rows, task, eos)


def _encode_pairs(tokenizer: Tokenizer, rows: Sequence[Row], task: Task, eos: int | None) -> Iterator[Example]:
    """Rows of a prompt and targets."""
    pairs = task.pairs(rows, tokenizer.eos, tokenizer.chat)
    chats = [task.is_chat(row) for row in rows]
    prompts: dict[int, Ints] = {}
    encoded: dict[int, Iterator[Ints]] = {}
    for chat in {*chats}:  # the chat template has written the special tokens and the space after the prompt already
        mine = [i for i, c in enumerate(chats) if c == chat]
        prompts |= zip(mine, tokenizer.encode([pairs[i][0] for i in mine], add_special_tokens=not chat), strict=True)
        texts = [target for i in mine for target in pairs[i][1]]
        found = tokenizer.encode(texts, add_special_tokens=False) if chat else tokenizer.encode_targets(texts)
        encoded[chat] = iter(found)
    for i, (row, (_, targets)) in enumerate(zip(rows, pairs, strict=True)):
        prompt = prompts[i]
        if not len(prompt):
            raise row_error(row, i, "the prompt has no tokens; the first target token needs one before it")
        for _ in targets:
            target = next(encoded[chats[i]])
            closed = chats[i] and not tokenizer.special_ids.isdisjoint(target.tolist())
            ids = np.concatenate([prompt, target if closed else _append_eos(target, eos)])
            yield _targets_from(row, i, ids, len(prompt))


def _encode_conversation(tokenizer: Tokenizer, row: Row, number: int, eos: int | None, *, all_tokens: bool) -> Example:
    """A whole conversation, whose targets are the assistant's turns, or all tokens but the first."""
    context, answer = split_conversation(row, number)
    messages = context + answer
    if all_tokens:
        text = chat_text(row, number, tokenizer.chat, messages, generation_prompt=False)
        (ids,) = tokenizer.encode([text], add_special_tokens=False)
        return _targets_from(row, number, ids, 1, has_no_prompt=True)
    if not tokenizer.marks_answers:
        msg = (
            "loss_on='assistant': the chat template does not mark the assistant's turns with {% generation %}; use "
            "'last', or a template that does"
        )
        raise ConfigError(msg)
    options = chat_options(row, number)
    try:
        ids, mask = tokenizer.chat_answers(messages, **options)
    except DataError as e:
        raise row_error(row, number, str(e)) from e
    if mask.any() and mask[-1] and tokenizer.special_ids.isdisjoint(ids[mask].tolist()):
        ids = _append_eos(ids, eos)
        mask = np.concatenate([mask, np.ones(len(ids) - len(mask), bool)])
    return _targets_at(row, number, ids, mask)


def _encode_ids(row: Row, number: int, vocab_size: int) -> Example:
    """A row with ``input_ids`` and its targets."""
    check_has_targets(row, number)
    ids, mask = tokenized_row(row, number, vocab_size)
    if not mask[1:].any():
        raise row_error(row, number, "labels: expected at least one target after the first token, got -100 everywhere")
    return _targets_at(row, number, ids, mask, has_no_prompt=bool(mask[0]))


def _append_eos(target: Ints, eos: int | None) -> Ints:
    """``target`` with the end token, unless it ends with the token already or the tokenizer has none."""
    return target if eos is None or (len(target) and target[-1] == eos) else np.append(target, np.int32(eos))


def _targets_from(row: Row, number: int, ids: Ints, start: int, *, has_no_prompt: bool = False) -> Example:
    """An example whose targets are all tokens from index ``start`` on."""
    return _example(row, number, ids, np.arange(start, len(ids)), has_no_prompt)


def _targets_at(row: Row, number: int, ids: Ints, mask: NDArray[np.bool_], *, has_no_prompt: bool = False) -> Example:
    """An example whose targets are marked by ``mask``, cut after the last one. The first token is no target."""
    targets = 1 + np.flatnonzero(mask[1:])
    return _example(row, number, ids[: targets[-1] + 1] if len(targets) else ids, targets, has_no_prompt)


def _example(row: Row, number: int, ids: Ints, targets: NDArray[np.int64], has_no_prompt: bool) -> Example:
    if not len(targets):
        raise row_error(row, number, "expected at least one target token after the first token, got none")
    return Example(ids, targets, number, has_no_prompt)
