"""`InspectedText`, the tokens of a prompt that `Prefix.inspect` measures, as training and generation read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from prefixfast.data.builtin_tasks import PLAIN, request_task
from prefixfast.data.columns import has_own_columns, has_target
from prefixfast.data.encode import Input, encode_examples, encode_prompts
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError, RequestError
from prefixfast.model.base import Model
from prefixfast.prefix.record import PrefixData


class InspectedText(NamedTuple):
    """Token ids of a prompt.

    Attributes:
        ids: Token ids, of the decoder in an encoder-decoder base.
        first: First position that is measured: the one before the target, 0 without a target.
        encoder_ids: Token ids of the encoder, None for a decoder-only base.
    """

    ids: list[int]
    first: int
    encoder_ids: list[int] | None = None


def inspected_text(model: Model, prefix: PrefixData, prompt: Input, index: int) -> InspectedText:
    """Token ids of a prompt. Without a target an infix is measured at the last token, the only one that sees it.

    Args:
        model: Base model.
        prefix: Prefix.
        prompt: String, token ids or row.
        index: Number of the prompt, for errors.

    Raises:
        RequestError: If the prompt is wrong or too long.
    """
    try:
        found = (_encode if model.seq2seq is None else _encode_pair)(model, prefix, prompt)
        if prefix.position == "infix" and not found.first:
            found = found._replace(first=len(found.ids) - 1)
    except (DataError, ConfigError, RequestError) as e:
        msg = f"prompt {index}: {str(e).removeprefix('row 0: ').removeprefix('request 0: ')}"
        raise RequestError(msg, index=index) from e
    room = model.max_positions - prefix.pos_start
    if not 0 < len(found.ids) <= room or found.first < 0:
        expected = f"1 to {room} tokens (the base's positions less the prefix), the first of them none of the target"
        msg = f"prompt {index}: expected {expected}, got {len(found.ids)}"
        raise RequestError(msg, index=index)
    if found.encoder_ids is not None and model.seq2seq is not None:
        most = model.seq2seq.encoder_positions
        if len(found.encoder_ids) > most:
            msg = f"prompt {index}: expected at most {most} tokens for the encoder, got {len(found.encoder_ids)}"
            raise RequestError(msg, index=index)
    return found


def _encode(model: Model, prefix: PrefixData, prompt: Input) -> InspectedText:
    """Token ids as in training: the prompt by the prefix's task, then the first target if the row has one."""
    task, is_row = _task_of(prefix, prompt)
    if not is_row or not isinstance(prompt, Mapping):
        return InspectedText(encode_prompts(model, [prompt], [PLAIN])[0].tolist(), 0)
    if task.format == "text" or not has_target(task, prompt):
        return InspectedText(encode_prompts(model, [prompt], [task])[0].tolist(), 0)
    last = replace(task, loss_on="last")
    example = next(encode_examples(model.require_tokenizer(), model.vocab_size, [prompt], last))
    return InspectedText(example.ids[:-1].tolist(), int(example.targets[0]) - 1)


def _encode_pair(model: Model, prefix: PrefixData, prompt: Input) -> InspectedText:
    """Token ids of the encoder, and of the decoder: its start token, then the first target if the row has one."""
    decoder, (task, _) = model.seq2seq, _task_of(prefix, prompt)
    assert decoder is not None
    if isinstance(prompt, Mapping) and (prompt.get("labels") is not None or has_target(task, prompt)):
        tokenizer = None if task.is_tokenized(prompt) else model.require_tokenizer()
        example = next(encode_examples(tokenizer, model.vocab_size, [prompt], task, decoder=decoder))
        assert example.encoder_ids is not None
        return InspectedText(example.ids[:-1].tolist(), int(example.targets[0]) - 1, example.encoder_ids.tolist())
    if decoder.start is None:
        msg = "this base starts its texts with their language; give a row with a target"
        raise ConfigError(msg)
    return InspectedText([decoder.start], 0, encode_prompts(model, [prompt], [task])[0].tolist())


def _task_of(prefix: PrefixData, prompt: Input) -> tuple[Task, bool]:
    """Task that reads a prompt, and whether the prompt is a row with texts."""
    if not isinstance(prompt, Mapping):
        return PLAIN, False
    task = PLAIN if prefix.task is None else Task.from_spec(prefix.task)
    if "input_ids" in prompt and not has_own_columns(task, prompt):
        return PLAIN, False
    return request_task(task, prompt), True
