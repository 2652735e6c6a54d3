"""What the kernels' own tests and `make gpu` share: tables from plain lists, random problems, and the error rule.

No Rust extension is needed here: the tables are built by loops that say what they mean, and serve as a twin of the planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefixfast_kernels.tables import DecodeTables, PackedTables
from prefixfast_kernels.tile_configs import Sizes

SMALL = Sizes(16, 16, 16)


@dataclass(frozen=True)
class Request:
    """One request: its tokens and its prefix blocks from left to right, as (block number, window slides over it).

    Attributes:
        length: Query tokens.
        blocks: What they see.
        cached: Keys before the first query (a later chunk of a prompt).
        blind: Leading tokens that see none of the blocks (a source before an infix).
    """

    length: int
    blocks: tuple[tuple[int, bool], ...] = ()
    cached: int = 0
    blind: int = 0


@dataclass(frozen=True)
class Segment:
    """A run of query rows that see the same blocks."""

    row: int
    rows: int
    key: int
    keys: int
    pos: int
    uses: list[tuple[int, int, int]]


def segments_of(requests: list[Request], blocks: list[tuple[int, int]]) -> list[Segment]:
    """The segments of packed requests: one each, two where leading tokens are blind."""
    out, row, key = [], 0, 0
    for r in requests:
        cuts = [(0, r.blind, False)] if r.blind else []
        for start, end, sees in [*cuts, (r.blind, r.length, True)]:
            out.append(
                Segment(
                    row + start, end - start, key, r.cached + end, r.cached + start, uses_of(r, blocks) if sees else []
                )
            )
        row, key = row + r.length, key + r.cached + r.length
    return out


def _ints(rows: Sequence[object], width: int = 0) -> Tensor:
    t = torch.tensor(rows, dtype=torch.int32)
    return t.view(-1, width) if width else t.view(-1)


def block_tables(
    queries: list[list[tuple[int, int]]], uses_of: list[list[tuple[int, int, int]]], blocks: list[tuple[int, int]]
) -> list[Tensor]:
    """The eight block tables.

    Args:
        queries: Of each segment (query row, position).
        uses_of: Of each segment (block, position of its first row, slides).
        blocks: (first row, rows).
    """
    users: list[list[tuple[int, int, int]]] = [[] for _ in blocks]
    for rows, uses in zip(queries, uses_of, strict=True):
        for block, pos, slides in uses:
            users[block] += [(row, pos - at, slides) for row, at in rows]
    flat = [u for us in users for u in sorted(us)]
    span = [
        (us[0][0], len(us), int([r for r, *_ in us] == list(range(us[0][0], us[0][0] + len(us)))))
        for us in map(sorted, users)
    ]
    indptr = [0]
    for uses in uses_of:
        indptr.append(indptr[-1] + len(uses))
    user_indptr = [0]
    for us in users:
        user_indptr.append(user_indptr[-1] + len(us))
    columns = [_ints([u[i] for u in flat]) for i in range(3)]
    return [
        _ints(indptr),
        _ints([u for us in uses_of for u in us], 3),
        _ints(blocks, 2),
        _ints(user_indptr),
        *columns,
        _ints(span, 3),
    ]


def uses_of(sequence: Request, blocks: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Uses of a sequence: blocks from left to right, ending right before key 0."""
    pos, out = -sum(blocks[b][1] for b, _ in sequence.blocks), []
    for block, slides in sequence.blocks:
        out.append((block, pos, int(slides)))
        pos += blocks[block][1]
    return out


def packed_tables(
    requests: list[Request], blocks: list[tuple[int, int]], sizes: Sizes = SMALL, *, num_buckets: int = 3
) -> PackedTables:
    """Tables of packed requests; every block must be used."""
    segments = segments_of(requests, blocks)
    queries = [[(s.row + t, s.pos + t) for t in range(s.rows)] for s in segments]
    tables = block_tables(queries, [s.uses for s in segments], blocks)
    starts = [sum(s.length for s in requests[:i]) for i in range(len(requests))]
    order = sorted(range(len(requests)), key=lambda i: requests[i].length)
    size = -(-len(order) // num_buckets)
    bucket: list[tuple[int, int]] = []
    gather: list[int] = []
    scatter = [0] * sum(s.length for s in requests)
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        longest = max(requests[i].length for i in part)
        bucket.append((len(part), longest))
        for i in part:
            for t in range(longest):
                if t < requests[i].length:
                    scatter[starts[i] + t] = len(gather)
                gather.append(starts[i] + min(t, requests[i].length - 1))
    seg = [(s.row, s.rows, s.key, s.keys) for s in segments]
    return PackedTables._make(
        [
            *tables,
            _ints(seg, 4),
            _ints([s.pos for s in segments]),
            _ints(bucket, 2),
            _ints(gather),
            _ints(scatter),
            *_tiles(segments, blocks, sizes),
        ]
    )


def _tiles(segments: list[Segment], blocks: list[tuple[int, int]], sizes: Sizes) -> list[Tensor]:
    """``tiles``, ``key_tiles`` and ``block_tiles``; empty without sizes."""
    if not sizes.tokens:
        return [_ints([], 2), _ints([], 3), _ints([], 2)]
    tiles = [(i, s.row + t) for i, s in enumerate(segments) for t in range(0, s.rows, sizes.tokens)]
    keys = []
    for i, s in enumerate(segments):
        if i + 1 == len(segments) or segments[i + 1].key != s.key:  # the last of those that share their keys
            first = min(j for j, other in enumerate(segments) if other.key == s.key)
            keys += [(first, i + 1, j) for j in range(0, s.keys, sizes.keys)]
    rows = [(b, j) for b, (_, length) in enumerate(blocks) for j in range(0, length, sizes.rows)]
    return [_ints(tiles, 2), _ints(keys, 3), _ints(rows, 2)]


def decode_tables(lens: list[int], sequences: list[Request], blocks: list[tuple[int, int]]) -> DecodeTables:
    """Tables of a decode step in which row i has ``lens[i]`` keys and the blocks of ``sequences[i]``; without the work of a kernel (`decode_cases`)."""
    queries = [[(i, n - 1)] for i, n in enumerate(lens)]
    tables = block_tables(queries, [uses_of(s, blocks) for s in sequences], blocks)
    return DecodeTables._make([*tables, _ints(list(range(len(lens)))), _ints(lens), _ints([], 6), *[_ints([])] * 3])


@dataclass(frozen=True)
class Problem:
    """A random attention problem; tensors fp64.

    Attributes:
        q: Queries; ``k``, ``v``, ``prefix_k``, ``prefix_v`` and ``do`` (gradient of the output) as in `reference.attn`.
        tables: Its tables.
        scale: Of the scores.
        slots: Where the keys lie in ``k``, or None: in order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    do: Tensor
    tables: PackedTables
    scale: float
    slots: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype (the prefix stays in at least fp32, as trained prefixes do)."""
        own = torch.promote_types(dtype, torch.float32)
        q, k, v, do = (t.to(dtype) for t in (self.q, self.k, self.v, self.do))
        return replace(
            self,
            q=q,
            k=k,
            v=v,
            do=do,
            prefix_k=self.prefix_k.to(dtype).to(own),
            prefix_v=self.prefix_v.to(dtype).to(own),
        )

    def to(self, device: torch.device | str) -> Problem:
        """The same problem on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved, tables=PackedTables(*(t.to(device) for t in self.tables)))

    def inputs(self) -> list[Tensor]:
        """q, k, v, prefix_k, prefix_v as fresh leaves."""
        return [t.detach().clone().requires_grad_() for t in (self.q, self.k, self.v, self.prefix_k, self.prefix_v)]


def problem(
    requests: list[Request],
    block_lengths: list[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sizes: Sizes = SMALL,
    arena: bool = False,
    seed: int = 0,
) -> Problem:
    """A random problem; blocks lie in the prefix tensor with gaps, so that a wrong row is seen; with ``arena`` the keys lie scattered among unused rows."""
    g = torch.Generator().manual_seed(seed)
    blocks, row = [], 0
    for length in block_lengths:
        blocks.append((row, length))
        row += length + 3
    n, m = sum(r.length for r in requests), sum(r.cached + r.length for r in requests)
    slots = torch.randperm(m + 9, generator=g)[:m].int() if arena else None
    keys = (m + 9 if arena else m, num_kv_heads, head_dim)
    shapes = [
        (n, num_heads, head_dim),
        keys,
        keys,
        *[(max(row, 1), num_kv_heads, head_dim)] * 2,
        (n, num_heads, head_dim),
    ]
    q, k, v, pk, pv, do = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    return Problem(q, k, v, pk, pv, do, packed_tables(requests, blocks, sizes), head_dim**-0.5, slots)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()
