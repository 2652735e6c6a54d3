"""Rows of encoder-decoder base models: the encoder reads the prompt, and the decoder writes the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prefixfast.data.encode.example import Example
from prefixfast.data.encode.token_ids import Ints, vocabulary_error
from prefixfast.data.encode.tokenized import IGNORED_LABEL, check_decoder_inputs, encoder_row, label_row
from prefixfast.data.rows import Row, row_error
from prefixfast.data.task import Task
from prefixfast.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prefixfast.model.base import Model

ADVICE = "an encoder-decoder base reads one text and writes another; give rows with prompt and completion"


class DecoderTokens(Protocol):
    """Tokens of the decoder of an encoder-decoder base model."""

    @property
    def vocab_size(self) -> int:
        """Number of rows of the decoder's embedding."""

    @property
    def pad(self) -> int:
        """Id of the padding token."""

    @property
    def skips_pads(self) -> bool:
        """Whether padding tokens inside a text take no position."""

    @property
    def encoder_positions(self) -> int:
        """Number of positions of the encoder."""

    def decoder_ids(self, labels: Ints) -> Ints:
        """Start token and labels, int32 ``[n + 1]``, with padding in the place of each label of -100."""


def encode_seq2seq(
    tokenizer: Tokenizer | None,
    vocab_size: int,
    decoder: DecoderTokens,
    rows: Sequence[Row],
    task: Task,
    *,
    append_eos: bool = True,
) -> Iterator[Example]:
    """Yield the examples of rows in order, one for each reference of a row.

    Args:
        tokenizer: Tokenizer; None is allowed only for rows that are read by their ``input_ids``.
        vocab_size: Number of rows of the encoder's embedding.
        decoder: Tokens of the decoder.
        rows: Rows, at least one. Either all of them have ``input_ids`` or none.
        task: Task of the rows.
        append_eos: Whether targets end with the tokenizer's end token.

    Raises:
        DataError: If a row is malformed, or is a conversation or a whole text.
    """
    if task.is_tokenized(rows[0]):
        for i, row in enumerate(rows):
            given = label_row(row, i, decoder.vocab_size)
            example = labelled_example(decoder, encoder_row(row, i, vocab_size), given, i)
            check_decoder_inputs(row, i, example.ids[:-1])
            yield _without_pads(decoder, example, row)
        return
    assert tokenizer is not None
    for i, row in enumerate(rows):
        check_is_pair(row, i, task)
    pairs = task.pairs(rows, "")
    sources = tokenizer.encode([source_text(prompt, task) for prompt, _ in pairs])
    texts = [target.strip() if task.strip else target for _, targets in pairs for target in targets]
    encoded = iter(encode_labels(tokenizer, texts, append_eos=append_eos))
    for i, (row, source, (_, targets)) in enumerate(zip(rows, sources, pairs, strict=True)):
        if not len(source):
            raise row_error(row, i, "the prompt has no tokens; the encoder needs one")
        for _ in targets:
            labels = next(encoded)
            error = vocabulary_error(source, vocab_size) or vocabulary_error(labels, decoder.vocab_size)
            if error or not len(labels):
                raise row_error(row, i, error or "the target has no tokens")
            yield _without_pads(decoder, labelled_example(decoder, source, labels, i), row)


def labelled_example(decoder: DecoderTokens, encoder_ids: Ints, labels: NDArray[np.integer[Any]], row: int) -> Example:
    """Example of a text and its labels, as ``labels=`` of Hugging Face models predicts them.

    Args:
        decoder: Tokens of the decoder.
        encoder_ids: Token ids of the source, int32, at least one.
        labels: Token ids that the decoder predicts, -100 where it predicts none. One at least is another number.
        row: Number of the row.
    """
    targets = 1 + np.flatnonzero(labels != IGNORED_LABEL)
    return Example(decoder.decoder_ids(labels[: targets[-1]].astype(np.int32)), targets, row, encoder_ids=encoder_ids)


def _without_pads(decoder: DecoderTokens, example: Example, row: Row) -> Example:
    """The example, if the base model reads its padding tokens as others; else `DataError` is raised."""
    for ids in (example.encoder_ids, example.ids[:-1]):
        if ids is not None and (error := pad_error(decoder, ids)):
            raise row_error(row, example.row, error)
    return example


def pad_error(decoder: DecoderTokens, ids: Ints) -> str | None:
    """Error message for padding tokens that the base model does not read as other tokens, None if there are none."""
    if decoder.pad not in ids:
        return None
    if decoder.skips_pads:
        token = f"the padding token {decoder.pad} inside a text takes no position in this base"
        return f"{token}, and -100 between labels is one; leave it out"
    if not 0 <= decoder.pad < decoder.vocab_size:
        token = f"the padding token {decoder.pad}, which the base's embedding lacks"
        return f"labels: -100 between labels counts as {token}; leave it out"
    return None


def encode_labels(tokenizer: Tokenizer, texts: Sequence[str], *, append_eos: bool = True) -> list[Ints]:
    """Token ids of targets, with the special tokens of the tokenizer's target mode.

    Args:
        tokenizer: Tokenizer.
        texts: Targets.
        append_eos: Whether the special tokens at the end stay, and an end token is appended that is not among them.
    """
    found = []
    for ids in tokenizer.encode_labels(texts):
        count = num_trailing(ids, tokenizer.special_ids)
        if not append_eos:
            found.append(ids[: len(ids) - count])
        elif (eos := tokenizer.eos_id) is None or eos in ids[len(ids) - count :]:
            found.append(ids)
        else:
            found.append(np.append(ids, np.int32(eos)))
    return found


def num_trailing(ids: NDArray[np.integer[Any]], special: frozenset[int]) -> int:
    """Number of special tokens at the end."""
    count = 0
    while count < len(ids) and int(ids[len(ids) - 1 - count]) in special:
        count += 1
    return count


def kept(ids: NDArray[np.integer[Any]], limit: int, special: frozenset[int]) -> NDArray[np.int64]:
    """Places of the tokens that stay in a text of at most ``limit`` tokens, as a tokenizer truncates.

    Args:
        ids: Token ids.
        limit: Largest number of tokens, at least 1.
        special: Ids of the special tokens, of which those at the end stay.
    """
    if len(ids) <= limit:
        return np.arange(len(ids))
    last = min(num_trailing(ids, special), limit)
    return np.concatenate([np.arange(limit - last), np.arange(len(ids) - last, len(ids))])


def special_ids(model: Model) -> frozenset[int]:
    """Ids of the special tokens of a base model: those of its tokenizer, or without one its end tokens."""
    if model.tokenizer is not None:
        return model.tokenizer.special_ids
    settings = getattr(model.hf, "generation_config", None) or model.hf.config
    end = settings.eos_token_id
    return frozenset(end if isinstance(end, list) else () if end is None else (end,))


def source_text(prompt: str, task: Task) -> str:
    """Source of a row. Prompts of ``{"prompt"}`` rows and of templates of columns are used as typed.

    Args:
        prompt: Prompt that the task writes, without an end token.
        task: Task of the row. If it strips generated text, it also strips what its template puts around the text.
    """
    is_typed = task.linearizer is None and task.format in ("prompt", "columns")
    return prompt.strip() if task.strip and not is_typed else prompt


def check_is_pair(row: Row, number: int, task: Task) -> None:
    """Raise `DataError` for a conversation or a whole text, which is not a text and a target."""
    if task.format == "text":
        raise row_error(row, number, f"text: expected a prompt or a document beside the target; {ADVICE}")
    if task.format == "messages" or task.is_chat(row):
        raise row_error(row, number, f"expected texts, got a conversation; {ADVICE}")
