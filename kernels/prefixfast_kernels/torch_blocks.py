"""Blocks of keys that the `torch` backend merges by log-sum-exp: prefix blocks, and contexts of continued prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels.reference import accumulator
from prefixfast_kernels.tables import BlockTables, PackedTables
from prefixfast_kernels.torch_mask import Mask, run_mask, user_mask


@dataclass(frozen=True)
class Block:
    """Consecutive keys that several query rows see, a prefix block or the context of a continued prompt.

    Attributes:
        rows: Rows of the key tensor.
        users: Query rows that see the keys.
        mask: Mask of the users' queries over the keys, or None.
    """

    rows: slice | Tensor
    users: slice | Tensor
    mask: Mask | None


def prefix_blocks(tables: BlockTables, window: int, bias: Tensor | None, like: Tensor) -> Iterator[Block]:
    """Prefix blocks with their users and masks, in the order from left to right for each query."""
    blocks, dtype = tables.block.tolist(), accumulator(like.dtype)
    for block, entries, users in _users_in_order(tables):
        start, length = blocks[block]
        mask = None
        if window or bias is not None:
            mask = user_mask(tables.user_pos[entries], length, tables.user_slides[entries], window, bias, dtype)
        yield Block(slice(start, start + length), users, mask)


def _users_in_order(tables: BlockTables) -> Iterator[tuple[int, slice | Tensor, slice | Tensor]]:
    """Block, entries of the user tables, and query rows of groups in which no query row occurs twice.

    A block has one group for each place that it takes in compositions. The order of a query's groups is that of its
    composition and does not depend on the numbers of the blocks.
    """
    if len(tables.use) == 0:
        return
    if int(tables.use_indptr.diff().max()) <= 1:
        spans, starts = tables.span.tolist(), tables.user_indptr.tolist()
        for block, ((first, count, consecutive), a) in enumerate(zip(spans, starts[:-1], strict=True)):
            own = slice(a, a + count)
            yield block, own, slice(first, first + count) if consecutive else tables.user[own]
        return
    # The place of an entry is the rank of its position among the entries of its query row.
    key, order = ((tables.user.long() << 32) + tables.user_pos).sort()
    row = key + (1 << 31) >> 32
    place = torch.empty_like(row)
    place[order] = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    num_blocks = len(tables.block)
    block_of = torch.repeat_interleave(tables.user_indptr.diff())
    groups, entries = (place * num_blocks + block_of).sort(stable=True)
    numbers, counts = groups.unique_consecutive(return_counts=True)
    for number, own in zip(numbers.tolist(), entries.split(counts.tolist()), strict=True):
        users = tables.user[own]
        first, last = int(users[0]), int(users[-1])
        is_run = last - first + 1 == len(users)  # users are ascending
        yield number % num_blocks, own, slice(first, last + 1) if is_run else users


def blocks_by_sequence(tables: PackedTables, window: int, bias: Tensor | None, like: Tensor) -> Iterator[Block]:
    """Prefix blocks of each segment by itself, from left to right."""
    blocks, uses, starts = tables.block.tolist(), tables.use.tolist(), tables.use_indptr.tolist()
    segments = zip(tables.seg.tolist(), tables.seg_pos.tolist(), starts[:-1], starts[1:], strict=True)
    for (row, rows, _, _), query, first, last in segments:
        for block, position, slides in uses[first:last]:
            start, length = blocks[block]
            mask = _mask(position - query, (rows, length), window if slides else 0, bias, like)
            yield Block(slice(start, start + length), slice(row, row + rows), mask)


def contexts(
    sequences: list[tuple[int, int, int, int]], slots: Tensor, window: int, bias: Tensor | None, like: Tensor
) -> Iterator[Block]:
    """Keys of each sequence before its queries, as blocks of the arena."""
    for row, rows, key, keys in sequences:
        if context := keys - rows:
            mask = _mask(-context, (rows, context), window, bias, like)
            yield Block(slots[key : key + context], slice(row, row + rows), mask)


def _mask(first: int, shape: tuple[int, int], window: int, bias: Tensor | None, like: Tensor) -> Mask | None:
    return run_mask(first, shape, window, bias, accumulator(like.dtype), like.device)
