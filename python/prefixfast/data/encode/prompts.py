"""Prompts and targets of requests, and whole texts, as token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from prefixfast.config.json_types import JSON
from prefixfast.data.chat import ChatTemplate
from prefixfast.data.encode.seq2seq import DecoderTokens, check_is_pair, encode_labels, pad_error, source_text
from prefixfast.data.encode.token_ids import ANY_VOCABULARY, Ints, token_ids, vocabulary_error
from prefixfast.data.encode.tokenized import check_tokenized, encoder_row, padded_ids, request_ids
from prefixfast.data.formats import TOKENIZED_KEYS
from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError, RequestError, is_text, shown
from prefixfast.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prefixfast.model.base import Model

Input: TypeAlias = str | Sequence[int] | Row


@contextlib.contextmanager
def request_error(index: int) -> Iterator[None]:
    """Raise a `DataError` or `ConfigError` of the block as a `RequestError` of the request with this number."""
    try:
        yield
    except (DataError, ConfigError) as e:
        msg = f"request {index}: {str(e).removeprefix('row 0: ')}"
        raise RequestError(msg, index=index) from e


def encode_prompts(model: Model, batch: Sequence[Input], tasks: Sequence[Task]) -> list[Ints]:
    """Token ids of the prompt of each request. Rows of one task are linearized and tokenized together.

    The prompt of an encoder-decoder base model is the text of its encoder.

    Args:
        model: Base model.
        batch: Strings, lists of token ids, or rows. The target of a row is not read.
        tasks: Task of each request. Requests of one task share one object.

    Returns:
        Token ids of each prompt, int32, at least one.

    Raises:
        RequestError: If a prompt is not text, has no tokens, or has ids outside the vocabulary.
        ConfigError: If the base model has no tokenizer and a request needs one.
    """
    decoder = decoder_of(model)
    texts, chats = _prompt_texts(
        batch,
        tasks,
        lambda: _TemplateParts.of(model.require_tokenizer()) if decoder is None else _TemplateParts(),
        has_encoder=decoder is not None,
    )
    out: dict[int, Ints] = {}
    for group in (texts, chats):
        if group:
            encoded = model.require_tokenizer().encode(list(group.values()), add_special_tokens=group is texts)
            out |= zip(group, encoded, strict=True)
    for i, item in enumerate(batch):
        if i not in out:
            out[i] = _given_ids(item, i, model.vocab_size, request_ids if decoder is None else encoder_row)
        error = vocabulary_error(out[i], model.vocab_size) if len(out[i]) else "the prompt has no tokens"
        if not error and decoder is not None:
            error = pad_error(decoder, out[i])
        if error:
            msg = f"request {i}: {error}"
            raise RequestError(msg, index=i)
    return [out[i] for i in range(len(batch))]


def check_prompts(batch: Sequence[Input], tasks: Sequence[Task]) -> None:
    """Check the prompts of requests as far as no base model is needed.

    Args:
        batch: Strings, lists of token ids, or rows.
        tasks: Task of each request.

    Raises:
        RequestError: If a prompt is no text and no list of token ids, or a row is malformed.
    """
    texts, chats = _prompt_texts(batch, tasks, _TemplateParts)
    for i, item in enumerate(batch):
        if i not in texts and i not in chats:
            _given_ids(item, i, ANY_VOCABULARY, _checked_ids)


def decoder_of(model: Model) -> DecoderTokens | None:
    """Tokens of the decoder of an encoder-decoder base model, None for a decoder-only one."""
    return model.seq2seq


def _no_template(messages: Sequence[Mapping[str, JSON]], **options: Any) -> str:
    """Empty text in place of that of a chat template, for checks without a tokenizer."""
    return ""


class _TemplateParts(NamedTuple):
    """End token and chat template of a tokenizer, which prompts contain; the defaults are those of a check."""

    eos: str | None = ""
    chat: ChatTemplate = _no_template

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _TemplateParts:
        return cls(tokenizer.eos, tokenizer.chat)


def _prompt_texts(
    batch: Sequence[Input],
    tasks: Sequence[Task],
    parts: Callable[[], _TemplateParts],
    *,
    has_encoder: bool = False,
) -> tuple[dict[int, str], dict[int, str]]:
    """Prompts of the requests that hold text, by number, and prompts that a chat template has written.

    Args:
        batch: Requests.
        tasks: Task of each request.
        parts: Function that returns what prompts contain of the tokenizer, called if there are rows with text.
        has_encoder: Whether the prompts are sources of an encoder-decoder base, which reads no conversations.

    Raises:
        RequestError: If a row is malformed.
    """
    texts = {i: item for i, item in enumerate(batch) if isinstance(item, str)}
    chats: dict[int, str] = {}
    by_task: dict[int, list[int]] = {}
    for i, (item, task) in enumerate(zip(batch, tasks, strict=True)):
        if isinstance(item, Mapping) and not task.is_tokenized(item):
            by_task.setdefault(id(task), []).append(i)
    for numbers in by_task.values():
        task = tasks[numbers[0]]
        if has_encoder:
            _check_are_pairs(task, batch, numbers)
        for i, prompt in zip(numbers, _task_prompts(task, batch, numbers, parts()), strict=True):
            item = batch[i]
            if has_encoder:
                texts[i] = source_text(prompt, task)
                continue
            (chats if isinstance(item, Mapping) and task.is_chat(item) else texts)[i] = prompt
    for group in (texts, chats):
        for i, prompt in group.items():
            _check_unicode(prompt, i, "the prompt is no text")
    return texts, chats


def _given_ids(item: Any, index: int, vocab_size: int, read: Callable[[Row, int, int], Ints]) -> Ints:
    """Token ids that a request holds, as a list or under ``input_ids``; ``read`` takes them from a row with masks."""
    with request_error(index):
        if isinstance(item, Mapping) and any(item.get(key) is not None for key in TOKENIZED_KEYS[1:]):
            return read(item, 0, vocab_size)
    value = item["input_ids"] if isinstance(item, Mapping) else item
    found = token_ids(value, vocab_size)
    if found is None:
        ids = "a list of token ids" + ("" if vocab_size == ANY_VOCABULARY else f" from 0 to {vocab_size - 1}")
        msg = f"request {index}: expected a string, {ids}, or a row, got {shown(value)}"
        raise RequestError(msg, index=index)
    return found


def encode_target(model: Model, target: str | Sequence[int], index: int) -> Ints:
    """Token ids of a target, int32, without an end token.

    Special tokens that a tokenizer puts before the labels of an encoder-decoder base model are part of a target.

    Args:
        model: Base model.
        target: String, or token ids that are used unchanged.
        index: Number of the request, for errors.

    Raises:
        RequestError: If the target is not text, or has ids outside the vocabulary.
    """
    decoder = decoder_of(model)
    vocab_size = model.vocab_size if decoder is None else decoder.vocab_size
    if isinstance(target, str):
        _check_unicode(target, index, "target: it is no text")
        tokenizer = model.require_tokenizer()
        if decoder is None:
            ids = tokenizer.encode_targets([target])[0]
        else:
            ids = encode_labels(tokenizer, [target], append_eos=False)[0]
        if error := vocabulary_error(ids, vocab_size):
            msg = f"request {index}: target: {error}"
            raise RequestError(msg, index=index)
        return ids
    found = token_ids(target, vocab_size)
    if found is None:
        last = vocab_size - 1
        msg = f"request {index}: target: expected a string or a list of token ids from 0 to {last}, got {shown(target)}"
        raise RequestError(msg, index=index)
    return found


def encode_text(model: Model, source: str | Sequence[int] | Sequence[Mapping[str, JSON]]) -> Ints:
    """Token ids of a whole text.

    Args:
        model: Base model.
        source: String, tokenized as a prompt is; token ids, used unchanged; or chat messages, written by the chat
            template without its generation prompt.

    Returns:
        Token ids, int32, at least one.

    Raises:
        ConfigError: If ``source`` is something else or has no tokens, or the chat template refuses the messages.
    """
    if isinstance(source, str) and not is_text(source):
        msg = f"text: expected Unicode text without half a surrogate pair, got {shown(source)}"
        raise ConfigError(msg)
    if isinstance(source, str):
        ids = model.require_tokenizer().encode([source])[0]
    elif isinstance(source, Sequence) and source and all(isinstance(m, Mapping) for m in source):
        ids = _encode_messages(model.require_tokenizer(), source)
    elif (found := token_ids(source, model.vocab_size)) is not None:
        ids = found
    else:
        last = model.vocab_size - 1
        msg = (
            f"text: expected a string, token ids from 0 to {last}, or messages {{'role', 'content'}}, got "
            f"{shown(source)}"
        )
        raise ConfigError(msg)
    if not len(ids):
        msg = f"text: expected at least one token, got {shown(source)}"
        raise ConfigError(msg)
    if error := vocabulary_error(ids, model.vocab_size):
        msg = f"text: {error}"
        raise ConfigError(msg)
    return ids


def _task_prompts(task: Task, batch: Sequence[Any], numbers: list[int], parts: _TemplateParts) -> list[str]:
    """Prompts of requests of one task. If the batch is refused, each is tried alone to find the wrong one."""
    try:
        return task.prompts([batch[i] for i in numbers], *parts)
    except (DataError, ConfigError):
        for i in numbers:
            with request_error(i):
                task.prompts([batch[i]], *parts)
        raise


def _check_are_pairs(task: Task, batch: Sequence[Any], numbers: list[int]) -> None:
    """Raise `RequestError` for a row that is no source of an encoder-decoder base."""
    for i in numbers:
        with request_error(i):
            check_is_pair(batch[i], 0, task)


def _checked_ids(row: Row, number: int, vocab_size: int) -> Ints:
    """Token ids of a request whose kind of base model is not known: those with its targets."""
    check_tokenized(row, number)
    return padded_ids(row, number, vocab_size)[0].astype(np.int32)


def _check_unicode(value: str, index: int, message: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as e:
        msg = f"request {index}: {message}: {e}"
        raise RequestError(msg, index=index) from e


def _encode_messages(tokenizer: Tokenizer, messages: Sequence[Any]) -> Ints:
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or "content" not in message:
            msg = f"text: message {i}: expected 'role' and 'content', got the keys {sorted(map(str, message))}"
            raise ConfigError(msg)
    if not getattr(tokenizer.hf, "chat_template", None):
        msg = "text: this tokenizer has no chat template; give a string, or load(model, tokenizer=...) one that has"
        raise ConfigError(msg)
    try:
        written = tokenizer.chat(messages, generation_prompt=False)
    except DataError as e:
        msg = f"text: {e}"
        raise ConfigError(msg) from e
    except Exception as e:  # a template is a program, which can raise anything
        msg = f"text: the chat template refuses the conversation: {e}"
        raise ConfigError(msg) from e
    try:
        return tokenizer.encode([written], add_special_tokens=False)[0]
    except UnicodeEncodeError as e:
        msg = f"text: a message is no text: {e}"
        raise ConfigError(msg) from e
