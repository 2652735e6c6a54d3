"""Tokenized training examples of several prefixes as ragged arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefixfast.data.encode import Example, Ints, decoder_of, encode_examples, special_ids
from prefixfast.data.rows import Row, row_error
from prefixfast.data.task import Task
from prefixfast.errors import DataError, named_errors, shown
from prefixfast.model.base import Model
from prefixfast.training.text_limits import TextLimits

NO_INFIX = (
    "an infix stands before the one target of a row, this row has targets in several places; {}, or train a prefix"
)
TOO_LONG = "raise max_length"
Overflow: TypeAlias = Literal["error", "truncate", "skip"]


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of tokenization.

    Attributes:
        task: Task of the rows.
        limit: Largest number of tokens of an example of a decoder-only base model.
        overflow: Policy for examples with more tokens.
        has_infix: Whether an infix stands before the last prompt token, so that the targets must follow each other.
        advice: Option that raises the limit, for the error of a longer example; None if no option does.
        texts: Limits of the texts of an encoder-decoder base model, None for a decoder-only one.
    """

    task: Task
    limit: int
    overflow: Overflow = "error"
    has_infix: bool = False
    advice: str | None = TOO_LONG
    texts: TextLimits | None = None


@dataclass(frozen=True)
class Examples:
    """Tokenized examples as ragged arrays.

    Shape letters: X examples, A target tokens, n prefixes.

    Attributes:
        ids: Token ids of all examples, int32. Example x is ``ids[indptr[x]:indptr[x + 1]]`` and ends with its last
            target.
        indptr: Offsets of the examples in ``ids``, int64 ``[X + 1]``.
        num_targets: Number of target tokens of each example, int32 ``[X]``, at least 1.
        target_at: Indices of the target tokens in ``ids``, int64 ``[A]``, ascending. The first token of an example is
            never a target.
        first: Offsets of the prefixes, int64 ``[n + 1]``. Prefix i has the examples ``first[i]`` to ``first[i + 1]``.
        num_skipped: Number of rows that ``overflow="skip"`` left out.
        num_truncated: Number of rows that ``overflow="truncate"`` shortened.
        encoder_ids: Token ids of the sources of all examples, int32; None for a decoder-only base model.
        encoder_indptr: Offsets of the examples in ``encoder_ids``, int64 ``[X + 1]``; None for a decoder-only one.
    """

    ids: Ints
    indptr: NDArray[np.int64]
    num_targets: Ints
    target_at: NDArray[np.int64]
    first: NDArray[np.int64]
    num_skipped: int = 0
    num_truncated: int = 0
    encoder_ids: Ints | None = None
    encoder_indptr: NDArray[np.int64] | None = None

    @property
    def lengths(self) -> Ints:
        """Number of tokens of each example, int32 ``[X]``; those of the decoder alone, if there is an encoder."""
        return np.diff(self.indptr).astype(np.int32)

    @property
    def encoder_lengths(self) -> Ints | None:
        """Number of tokens of each source, int32 ``[X]``; None for a decoder-only base model."""
        return None if self.encoder_indptr is None else np.diff(self.encoder_indptr).astype(np.int32)

    @cached_property
    def sizes(self) -> Ints:
        """Number of tokens of each example, those of the encoder included, int32 ``[X]``."""
        encoder = self.encoder_lengths
        return self.lengths if encoder is None else self.lengths + encoder

    @cached_property
    def target_indptr(self) -> NDArray[np.int64]:
        """Offsets of the examples in ``target_at``, int64 ``[X + 1]``."""
        return np.concatenate([[0], np.cumsum(self.num_targets, dtype=np.int64)])


def tokenize_rows(model: Model, rows_by_name: Mapping[str, Sequence[Row]], options: TokenizeOptions) -> Examples:
    """Tokenize the rows of prefixes.

    Args:
        model: Base model with its tokenizer.
        rows_by_name: Rows by prefix name, in the order of the prefixes. Rows with ``input_ids`` and ``labels`` (-100
            for tokens that are no target) are used unchanged.
        options: Task, length limit and overflow policy.

    Raises:
        DataError: If a row is malformed or too long, with the name of the prefix and the row's line or number.
    """
    found: list[Example] = []
    first, skipped, truncated, decoder = [0], 0, 0, decoder_of(model)
    for name, rows in rows_by_name.items():
        with named_errors(f"prefix {shown(name)}, ", DataError):
            tokenizer = None if options.task.is_tokenized(rows[0]) else model.require_tokenizer()
            for example in encode_examples(tokenizer, model.vocab_size, rows, options.task, decoder=decoder):
                if options.has_infix and not example.has_one_target:
                    is_tokenized = options.task.is_tokenized(rows[example.row])
                    advice = "label the last of them alone" if is_tokenized else "set loss_on='last'"
                    raise row_error(rows[example.row], example.row, NO_INFIX.format(advice))
                fitted = _fitted(model, example, options)
                if fitted is None and options.overflow == "error":
                    error = options.texts and options.texts.too_long(example)
                    error = error or too_long(example, options.limit, options.advice)
                    raise row_error(rows[example.row], example.row, error)
                skipped += fitted is None
                truncated += fitted is not None and fitted is not example
                found += [] if fitted is None else [fitted]
        if len(found) == first[-1]:
            msg = f"prefix {shown(name)}: no rows are left (overflow={shown(options.overflow)} left out {skipped})"
            raise DataError(msg)
        first.append(len(found))
    counts = np.array([len(e.targets) for e in found], np.int32)
    ids, indptr = _ragged([e.ids for e in found])
    target_at = np.concatenate([e.targets for e in found]) + np.repeat(indptr[:-1], counts)
    texts = [e.encoder_ids for e in found if e.encoder_ids is not None]
    encoder = _ragged(texts) if texts else (None, None)
    return Examples(ids, indptr, counts, target_at, np.array(first, np.int64), skipped, truncated, *encoder)


def _ragged(parts: Sequence[Ints]) -> tuple[Ints, NDArray[np.int64]]:
    """Concatenation of arrays, and the offset of each."""
    return np.concatenate(parts), _offsets([np.array([len(p) for p in parts])])


def _fitted(model: Model, example: Example, options: TokenizeOptions) -> Example | None:
    """The example as the overflow policy leaves it, None for nothing."""
    if (decoder := decoder_of(model)) is None or options.texts is None:
        return apply_overflow(example, options.limit, options.overflow)
    if options.texts.too_long(example) is None:
        return example
    return options.texts.cut(example, decoder, special_ids(model)) if options.overflow == "truncate" else None


def concat_examples(parts: Sequence[Examples]) -> Examples:
    """Concatenate the examples of several prefixes."""
    first = np.concatenate([[0], np.cumsum([len(p.num_targets) for p in parts])]).astype(np.int64)
    ids, num_targets = (np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "num_targets"))
    indptr = _offsets([p.lengths for p in parts])
    texts = [p.encoder_ids for p in parts if p.encoder_ids is not None]
    lengths = [own for p in parts if (own := p.encoder_lengths) is not None]
    starts = np.cumsum([0, *(len(p.ids) for p in parts[:-1])])
    target_at = np.concatenate([p.target_at + start for p, start in zip(parts, starts, strict=True)])
    skipped, truncated = (sum(getattr(p, name) for p in parts) for name in ("num_skipped", "num_truncated"))
    encoder = (np.concatenate(texts), _offsets(lengths)) if texts else (None, None)
    return Examples(ids, indptr, num_targets, target_at, first, skipped, truncated, *encoder)


def _offsets(lengths: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.int64]:
    """Offsets of the items of several ragged arrays in their concatenation."""
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])


def too_long(example: Example, limit: int, advice: str | None) -> str:
    """Error message for an example that does not fit.

    Args:
        example: Example.
        limit: Largest number of tokens.
        advice: Option that raises the limit, None if no option does.
    """
    choices = ", ".join(("shorten it", *(() if advice is None else (advice,))))
    return f"{len(example.ids)} tokens, at most {limit} fit; {choices}, or set overflow='truncate' or 'skip'"


def apply_overflow(example: Example, limit: int, overflow: Overflow) -> Example | None:
    """Apply the overflow policy to an example.

    Truncation removes the start of the prompt, of which one token stays before the first target. An example without a
    prompt loses its end.

    Args:
        example: Example.
        limit: Largest number of tokens.
        overflow: Policy; only ``"truncate"`` shortens the example.

    Returns:
        The example itself if it fits, the truncated example, or None if nothing is left.
    """
    excess = len(example.ids) - limit
    if excess <= 0:
        return example
    if overflow != "truncate":
        return None
    if example.has_no_prompt:
        targets = example.targets[example.targets < limit]
        return Example(example.ids[:limit], targets, example.row, True) if len(targets) else None
    if excess >= example.targets[0]:
        return None
    return Example(example.ids[excess:], example.targets - excess, example.row)
