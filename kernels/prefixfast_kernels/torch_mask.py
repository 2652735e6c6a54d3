"""Additive masks of the `torch` backend: keys that a sliding window hides, and the position bias.

Shape letters: B batch, HQ query heads, T queries, S keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Numbers that are added to the scores of a rectangular attention.

    Attributes:
        added: Numbers ``[1 or B, 1 or HQ, T, S]`` in the dtype of the scores, -inf where a key is hidden.
        blind: Whether a query sees no key, bool ``[1 or B, 1, T]``, or None if every query sees one.
    """

    added: Tensor
    blind: Tensor | None


def make_mask(seen: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Mask | None:
    """Mask of hidden keys and of a bias, None if both are absent.

    Args:
        seen: Whether a query sees a key, bool ``[1 or B, 1, T, S]``, or None if every query sees every key.
        bias: Bias ``[1 or B, HQ, T, S]``, or None.
        dtype: Dtype of the scores.
    """
    if seen is None:
        return None if bias is None else Mask(bias.to(dtype), None)
    shown = torch.zeros(seen.shape, dtype=dtype, device=seen.device) if bias is None else bias.to(dtype)
    return Mask(shown.masked_fill(~seen, -torch.inf), ~seen.any(-1))


def run_mask(
    first: int, shape: tuple[int, int], window: int, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Mask | None:
    """Mask of consecutive queries over consecutive keys.

    Args:
        first: Position of the first key relative to the first query.
        shape: Number of queries and number of keys.
        window: Sliding window in tokens, 0 for none.
        bias: Position bias ``[HQ, 2 * maxd + 1]`` by clamped (key position - query position), or None.
        dtype: Dtype of the scores.
        device: Device of the mask.
    """
    queries, keys = shape
    if not window and bias is None:
        return None
    # The distances of the last query, then those of each query before it, one further.
    distance = torch.arange(first + 1 - queries, first + keys, device=device)
    seen = None
    if window:
        seen = (distance > -window).unfold(0, keys, 1).flip(0)[None, None]
    # A gather for each pair of query and key would cost a seventh of the attention.
    by_pair = None if bias is None else bias_at(bias, distance).unfold(1, keys, 1).flip(1)[None]
    return make_mask(seen, by_pair, dtype)


def user_mask(
    first: Tensor, keys: int, slides: Tensor, window: int, bias: Tensor | None, dtype: torch.dtype
) -> Mask | None:
    """Mask of queries at any positions over consecutive keys.

    Args:
        first: Position of the first key relative to each query, ``[T]``.
        keys: Number of keys.
        slides: Whether a sliding window slides over the keys of each query, ``[T]``.
        window: Sliding window in tokens, 0 for none.
        bias: Position bias ``[HQ, 2 * maxd + 1]`` by clamped (key position - query position), or None.
        dtype: Dtype of the scores.
    """
    distance = first[:, None] + torch.arange(keys, device=first.device)
    seen = ((distance > -window) | (slides[:, None] == 0))[None, None] if window else None
    return make_mask(seen, None if bias is None else bias_at(bias, distance)[None], dtype)


def bias_at(bias: Tensor, distance: Tensor) -> Tensor:
    """Position bias ``[HQ, ...]`` at distances ``[...]``, each clamped to the distances of the table."""
    furthest = (bias.shape[1] - 1) // 2
    column = distance.clamp(-furthest, furthest) + furthest
    return bias.index_select(1, column.flatten()).unflatten(1, distance.shape)
