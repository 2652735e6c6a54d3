"""The planner's tables, built from plain lists by loops.

The loops are a counterpart of the planner (`rust/core/src/batch/plan.rs`) for its tests and need no Rust extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels.tables import DecodeTables, PackedTables
from prefixfast_kernels.tile_selection import TileSizes

SMALL_TILES = TileSizes(16, 16, 16)


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        length: Number of query tokens.
        blocks: Prefix blocks from left to right, as (block number, whether sliding windows slide over it).
        cached: Number of keys before the first query, for a later chunk of a prompt.
        infix_at: Number of leading tokens that see none of the blocks, for a source before an infix.
        keys: Number of keys where these are not the query tokens, as in cross-attention, and 0 for self-attention.
    """

    length: int
    blocks: tuple[tuple[int, bool], ...] = ()
    cached: int = 0
    infix_at: int = 0
    keys: int = 0

    @property
    def num_keys(self) -> int:
        """Number of keys."""
        return self.keys or self.cached + self.length


@dataclass(frozen=True)
class Segment:
    """A run of query rows that see the same blocks.

    Attributes:
        row: First query row.
        rows: Number of query rows.
        key: First key row.
        keys: Number of keys.
        pos: Position of the first query row.
        uses: Uses of blocks, as (block, position of its first row, 1 if a sliding window slides over it).
    """

    row: int
    rows: int
    key: int
    keys: int
    pos: int
    uses: list[tuple[int, int, int]]


def make_segments(requests: list[Request], blocks: list[tuple[int, int]]) -> list[Segment]:
    """Segments of packed requests: one for each request, two for a request with an infix."""
    out, row, key = [], 0, 0
    for r in requests:
        if r.keys:
            out.append(Segment(row, r.length, key, r.keys, 0, block_uses(r, blocks)))
            row, key = row + r.length, key + r.keys
            continue
        cuts = [(0, r.infix_at, False)] if r.infix_at else []
        for start, end, sees in [*cuts, (r.infix_at, r.length, True)]:
            uses = block_uses(r, blocks) if sees else []
            out.append(Segment(row + start, end - start, key, r.cached + end, r.cached + start, uses))
        row, key = row + r.length, key + r.num_keys
    return out


def _int32(rows: Sequence[object], width: int = 0) -> Tensor:
    t = torch.tensor(rows, dtype=torch.int32)
    return t.view(-1, width) if width else t.view(-1)


def block_tables(
    queries: list[list[tuple[int, int]]], uses: list[list[tuple[int, int, int]]], blocks: list[tuple[int, int]]
) -> list[Tensor]:
    """The eight tables of `BlockTables`, in order.

    Args:
        queries: Queries of each segment, as (query row, position).
        uses: Uses of each segment, as (block, position of its first row, 1 if a sliding window slides over it).
        blocks: Blocks, as (first row, number of rows).
    """
    users: list[list[tuple[int, int, int]]] = [[] for _ in blocks]
    for rows, segment_uses in zip(queries, uses, strict=True):
        for block, pos, slides in segment_uses:
            users[block] += [(row, pos - at, slides) for row, at in rows]
    flat = [u for us in users for u in sorted(us)]
    span = [
        (us[0][0], len(us), int([r for r, *_ in us] == list(range(us[0][0], us[0][0] + len(us)))))
        for us in map(sorted, users)
    ]
    columns = [_int32([u[i] for u in flat]) for i in range(3)]
    return [
        _offsets(uses),
        _int32([u for us in uses for u in us], 3),
        _int32(blocks, 2),
        _offsets(users),
        *columns,
        _int32(span, 3),
    ]


def _offsets(lists: Sequence[Sequence[object]]) -> Tensor:
    """Offset of each list in their concatenation, and the total length."""
    offsets = [0]
    for entries in lists:
        offsets.append(offsets[-1] + len(entries))
    return _int32(offsets)


def block_uses(request: Request, blocks: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Uses of a request: its blocks from left to right, ending right before key 0."""
    pos, out = -sum(blocks[b][1] for b, _ in request.blocks), []
    for block, slides in request.blocks:
        out.append((block, pos, int(slides)))
        pos += blocks[block][1]
    return out


def packed_tables(
    requests: list[Request], blocks: list[tuple[int, int]], sizes: TileSizes = SMALL_TILES, *, num_buckets: int = 3
) -> PackedTables:
    """Tables of packed requests.

    Args:
        requests: Requests in the order in which they are packed.
        blocks: Blocks, as (first row, number of rows), each of them used.
        sizes: Tile sizes that the work is cut into.
        num_buckets: Largest number of length buckets.
    """
    segments = make_segments(requests, blocks)
    queries = [[(s.row + t, s.pos + t) for t in range(s.rows)] for s in segments]
    return PackedTables._make(
        [
            *block_tables(queries, [s.uses for s in segments], blocks),
            _int32([(s.row, s.rows, s.key, s.keys) for s in segments], 4),
            _int32([s.pos for s in segments]),
            *_padded_layout([r.length for r in requests], num_buckets),
            *_tiles(segments, blocks, sizes),
        ]
    )


def _padded_layout(lengths: list[int], num_buckets: int) -> list[Tensor]:
    """``bucket``, ``gather`` and ``scatter``."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    size = -(-len(order) // num_buckets)
    bucket: list[tuple[int, int]] = []
    gather: list[int] = []
    scatter = [0] * sum(lengths)
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        longest = max(lengths[i] for i in part)
        bucket.append((len(part), longest))
        for i in part:
            for t in range(longest):
                if t < lengths[i]:
                    scatter[starts[i] + t] = len(gather)
                gather.append(starts[i] + min(t, lengths[i] - 1))
    return [_int32(bucket, 2), _int32(gather), _int32(scatter)]


def _tiles(segments: list[Segment], blocks: list[tuple[int, int]], sizes: TileSizes) -> list[Tensor]:
    """``tiles``, ``key_tiles`` and ``block_tiles``, empty for `NO_TILES`."""
    if not sizes.tokens:
        return [_int32([], 2), _int32([], 3), _int32([], 2)]
    tiles = [(i, s.row + t) for i, s in enumerate(segments) for t in range(0, s.rows, sizes.tokens)]
    keys = []
    for i, s in enumerate(segments):
        if i + 1 == len(segments) or segments[i + 1].key != s.key:  # the last of the segments that share their keys
            first = min(j for j, other in enumerate(segments) if other.key == s.key)
            keys += [(first, i + 1, j) for j in range(0, s.keys, sizes.keys)]
    rows = [(b, j) for b, (_, length) in enumerate(blocks) for j in range(0, length, sizes.rows)]
    return [_int32(tiles, 2), _int32(keys, 3), _int32(rows, 2)]


def decode_tables(lens: list[int], requests: list[Request], blocks: list[tuple[int, int]]) -> DecodeTables:
    """Tables of a decode step, without the work of the Triton kernel (`decode_work.with_work` adds it).

    Args:
        lens: Number of keys of each row.
        requests: Request of each row, of which only the blocks count.
        blocks: Blocks, as (first row, number of rows).
    """
    queries = [[(i, n - 1)] for i, n in enumerate(lens)]
    tables = block_tables(queries, [block_uses(r, blocks) for r in requests], blocks)
    no_work = (_int32([], 6), *[_int32([])] * 3)
    return DecodeTables._make([*tables, _int32(list(range(len(lens)))), _int32(lens), *no_work])
