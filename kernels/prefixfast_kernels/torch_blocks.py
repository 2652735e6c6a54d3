"""Blocks of keys that the `torch` backend merges by log-sum-exp: prefix blocks, and contexts of continued prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast_kernels.reference import accumulator
from prefixfast_kernels.tables import BlockTables, PackedTables
from prefixfast_kernels.torch_mask import Mask, run_mask, user_mask

# Largest number of elements of a block's queries that are copied in order to batch blocks of unequal numbers of users.
# Those of more queries cost more time than the calls that they save.
MAX_PADDED_NUMEL = 1 << 15


@dataclass(frozen=True)
class Block:
    """Keys that several query rows see: prefix blocks of one length side by side, or the context of one prompt.

    Attributes:
        rows: Rows of the key tensor, ``n`` times as many as a query sees.
        users: Query rows that see the keys, equally many for each of the ``n`` blocks.
        mask: Mask of the users' queries over the keys, or None.
        n: Number of prefix blocks.
        real: Entries of ``users`` that are no padding, ascending, or None if there is none. Padding repeats the last
            user of a block.
    """

    rows: slice | Tensor
    users: slice | Tensor
    mask: Mask | None
    n: int = 1
    real: Tensor | None = None


class _Users(NamedTuple):
    """Users of one block, none of which sees the block twice.

    Attributes:
        block: Number of the block.
        place: Place of the block in compositions. A query row occurs once in a place.
        start: First entry of the users.
        size: Number of users.
        first: First query row if the users are consecutive rows, else None.
    """

    block: int
    place: int
    start: int
    size: int
    first: int | None


def prefix_blocks(
    tables: BlockTables, window: int, bias: Tensor | None, like: Tensor, *, batched: bool = False
) -> Iterator[Block]:
    """Prefix blocks with their users and masks; a query comes to its blocks from left to right.

    Args:
        tables: Prefix blocks and the queries that see them.
        window: Sliding window in tokens, 0 for none.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, or None.
        like: Queries ``[N, HQ, D]``.
        batched: Whether blocks of one length are put side by side, where this is faster.
    """
    blocks, dtype = tables.block.tolist(), accumulator(like.dtype)
    order, groups = _users_in_order(tables)
    is_masked = bool(window) or bias is not None
    if batched and not is_masked:
        yield from _side_by_side(tables, order, groups, blocks, like[0].numel())
        return
    for own in groups:
        (start, length), mask = blocks[own.block], None
        if is_masked:
            entries: slice | Tensor = slice(own.start, own.start + own.size)
            entries = entries if order is None else order[entries]
            mask = user_mask(tables.user_pos[entries], length, tables.user_slides[entries], window, bias, dtype)
        yield Block(slice(start, start + length), _rows_of(own, tables, order), mask)


def _side_by_side(
    tables: BlockTables, order: Tensor | None, groups: list[_Users], blocks: list[list[int]], numel: int
) -> Iterator[Block]:
    """Blocks of one place and one length side by side, if they have equally many users or few.

    Args:
        tables: Prefix blocks and the queries that see them.
        order: Entries of the users, as `_users_in_order` gives them.
        groups: Users of each block.
        blocks: First row and number of rows of each block.
        numel: Number of elements of a query.
    """
    alike: dict[tuple[int, int, int], list[_Users]] = {}
    for own in groups:
        many = 0 if own.size * numel <= MAX_PADDED_NUMEL else own.size
        alike.setdefault((own.place, blocks[own.block][1], many), []).append(own)
    for (_, length, _), members in alike.items():
        n, most = len(members), max(own.size for own in members)
        starts = [blocks[own.block][0] for own in members]
        rows: slice | Tensor | None = _run(starts, length)
        if rows is None:
            rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(tables.user.device)
        firsts = [own.first for own in members if own.first is not None and own.size == most]
        users = _run(firsts, most) if len(firsts) == n else None
        if n == 1 or users is not None:
            yield Block(rows, _rows_of(members[0], tables, order) if users is None else users, None, n)
            continue
        place, counts = torch.arange(most), torch.tensor([own.size for own in members])[:, None]
        entries = torch.tensor([own.start for own in members])[:, None] + place.minimum(counts - 1)
        padded, real = (t.flatten().to(tables.user.device) for t in (entries, place < counts))
        every = tables.user[padded if order is None else order[padded]]
        yield Block(rows, every, None, n, None if bool((counts == most).all()) else real.nonzero()[:, 0])


def _run(starts: list[int], length: int) -> slice | None:
    """Rows of neighbouring ranges of one length, None if they are no neighbours."""
    if not starts or starts != list(range(starts[0], starts[0] + len(starts) * length, length)):
        return None
    return slice(starts[0], starts[0] + len(starts) * length)


def _rows_of(own: _Users, tables: BlockTables, order: Tensor | None) -> slice | Tensor:
    """Query rows of users."""
    if own.first is not None:
        return slice(own.first, own.first + own.size)
    entries: slice | Tensor = slice(own.start, own.start + own.size)
    return tables.user[entries if order is None else order[entries]]


def _users_in_order(tables: BlockTables) -> tuple[Tensor | None, list[_Users]]:
    """Entries of the user tables, and the users of each block in groups in which no query row occurs twice.

    A block has one group for each place that it takes in compositions. The order of a query's groups is that of its
    composition and does not depend on the numbers of the blocks.

    Returns:
        Entries of all groups, one after another, or None for all entries in order; and the groups.
    """
    if len(tables.use) == 0:
        return None, []
    if int(tables.use_indptr.diff().max()) <= 1:
        places = zip(tables.span.tolist(), tables.user_indptr.tolist()[:-1], strict=True)
        return None, [
            _Users(block, 0, start, count, first if is_run else None)
            for block, ((first, count, is_run), start) in enumerate(places)
        ]
    # The place of an entry is the rank of its position among the entries of its query row.
    key, order = ((tables.user.long() << 32) + tables.user_pos).sort()
    row = key + (1 << 31) >> 32
    place = torch.empty_like(row)
    place[order] = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    num_blocks = len(tables.block)
    block_of = torch.repeat_interleave(tables.user_indptr.diff())
    groups, entries = (place * num_blocks + block_of).sort(stable=True)
    numbers, counts = groups.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    firsts, lasts = (tables.user[entries[at]].tolist() for at in (ends - counts, ends - 1))
    found = zip(numbers.tolist(), ends.tolist(), counts.tolist(), firsts, lasts, strict=True)
    return entries, [
        # Users are ascending.
        _Users(number % num_blocks, number // num_blocks, end - count, count, first if last - first < count else None)
        for number, end, count, first, last in found
    ]


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
