"""Copies of new keys and values to rows of an arena on the CPU, in Rust: torch copies number by number.

Shape letters: N new tokens, H kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.cpu_decode import num_threads


def write_rows(arena: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], slots: Tensor) -> bool:
    """Copy new keys and values to rows of an arena, in place.

    Args:
        arena: Keys and values of the arena ``[arena rows, H, D]``.
        new: New keys and values ``[N, H, D]``.
        slots: Arena rows of the new tokens, int32 ``[N]``.

    Returns:
        Whether the rows were copied. They are not if the tensors differ in dtype or row shape, if a row or the slots
        are not contiguous, or if a tensor is not on the CPU. Nothing is written then.

    Raises:
        ConfigError: If a slot names no row of the arena. Nothing is written then.
    """
    keys, count = arena[0], len(slots)
    if not slots.is_cpu or slots.dtype != torch.int32 or slots.dim() != 1 or not slots.is_contiguous():
        return False
    if not all(_is_arena_like(t, keys) and t.is_contiguous() for t in arena):
        return False
    if not all(_is_arena_like(t, keys) and len(t) == count and _has_contiguous_rows(t) for t in new):
        return False
    row_bytes = keys.shape[1] * keys.shape[2] * keys.itemsize
    _rust.write_rows(
        (arena[0].data_ptr(), arena[1].data_ptr()),
        (min(map(len, arena)), row_bytes),
        [(t.data_ptr(), _span(count, stride := t.stride(0) * t.itemsize, row_bytes), stride) for t in new],
        (slots.data_ptr(), count),
        num_threads(),
    )
    return True


def _is_arena_like(t: Tensor, keys: Tensor) -> bool:
    """Whether a tensor has the device, the dtype and the row shape of an arena's keys on the CPU."""
    return t.is_cpu and t.dtype == keys.dtype and t.dim() == keys.dim() == 3 and t.shape[1:] == keys.shape[1:]


def _has_contiguous_rows(t: Tensor) -> bool:
    """Whether the numbers of each row lie next to each other."""
    return t.stride()[1:] == (t.shape[2], 1)


def _span(count: int, stride: int, row_bytes: int) -> int:
    """Bytes from the first of ``count`` rows to the end of the last."""
    return (count - 1) * stride + row_bytes if count else 0
