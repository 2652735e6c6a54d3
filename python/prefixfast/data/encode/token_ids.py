"""Checks of token ids that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int32]
ANY_VOCABULARY = 2**31 - 1  # number of tokens for a check without a base model, whose vocabulary is not known


def token_ids(value: Any, vocab_size: int) -> Ints | None:
    """Token ids as an array.

    Args:
        value: Sequence of token ids, or anything else.
        vocab_size: Number of tokens of the vocabulary.

    Returns:
        Token ids, int32. None if ``value`` is no flat sequence of integers, or an id is not in the vocabulary.
    """
    ids = np.zeros(0, np.int64) if isinstance(value, list | tuple) and not value else int_array(value)
    if ids is None or (len(ids) and (ids.min() < 0 or ids.max() >= vocab_size)):
        return None
    return ids.astype(np.int32)


def vocabulary_error(ids: NDArray[np.integer[Any]], vocab_size: int) -> str | None:
    """Error message for token ids that the embedding lacks, None if it has all.

    Args:
        ids: Token ids.
        vocab_size: Number of rows of the embedding.
    """
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if not len(wrong):
        return None
    if wrong[0] < 0:
        return f"expected token ids of at least 0, got {int(wrong[0])}"
    return (
        f"token id {int(wrong[0])} is not in the base model's embedding, which has the ids 0 to {vocab_size - 1}; "
        "give other ids, or call resize_token_embeddings if tokens were added to the tokenizer"
    )


def int_array(value: Any) -> NDArray[np.int64] | None:
    """A flat array of integers, int64; None if ``value`` is something else."""
    try:
        found = np.asarray(value) if isinstance(value, Sequence | np.ndarray) else np.zeros(())
        if isinstance(value, list | tuple) and bool in set(map(type, value)):
            return None  # numpy reads a boolean among integers as 0 or 1
        return found.astype(np.int64) if found.ndim == 1 and found.dtype.kind in "iu" else None
    except (ValueError, OverflowError):  # a ragged list, or a number beyond 64 bits
        return None
