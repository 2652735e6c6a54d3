"""What the kernels' own tests and `make gpu` share: tables from plain lists, random problems, and the error rule.

No Rust extension is needed here: the tables are built by loops that say what they mean, and serve as a twin of the planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels.tables import DecodeTables, PackedTables


@dataclass(frozen=True)
class Request:
    """One request: its tokens and its prefix blocks from left to right, as (block number, window slides over it)."""

    length: int
    blocks: tuple[tuple[int, bool], ...] = ()


def _ints(rows: Sequence[object], width: int = 0) -> Tensor:
    t = torch.tensor(rows, dtype=torch.int32)
    return t.view(-1, width) if width else t.view(-1)


def block_tables(queries: list[list[tuple[int, int]]], uses_of: list[list[tuple[int, int, int]]], blocks: list[tuple[int, int]]) -> list[Tensor]:
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
    span = [(us[0][0], len(us), int([r for r, *_ in us] == list(range(us[0][0], us[0][0] + len(us))))) for us in map(sorted, users)]
    indptr = [0]
    for uses in uses_of:
        indptr.append(indptr[-1] + len(uses))
    user_indptr = [0]
    for us in users:
        user_indptr.append(user_indptr[-1] + len(us))
    columns = [_ints([u[i] for u in flat]) for i in range(3)]
    return [_ints(indptr), _ints([u for us in uses_of for u in us], 3), _ints(blocks, 2), _ints(user_indptr), *columns, _ints(span, 3)]


def uses_of(sequence: Request, blocks: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Uses of a sequence: blocks from left to right, ending right before key 0."""
    pos, out = -sum(blocks[b][1] for b, _ in sequence.blocks), []
    for block, slides in sequence.blocks:
        out.append((block, pos, int(slides)))
        pos += blocks[block][1]
    return out


def packed_tables(sequences: list[Request], blocks: list[tuple[int, int]], *, num_buckets: int = 3) -> PackedTables:
    """Tables of packed causal sequences; every block must be used."""
    starts = [sum(s.length for s in sequences[:i]) for i in range(len(sequences))]
    queries = [[(start + t, t) for t in range(s.length)] for start, s in zip(starts, sequences, strict=True)]
    tables = block_tables(queries, [uses_of(s, blocks) for s in sequences], blocks)
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].length)
    size = -(-len(order) // num_buckets)
    bucket: list[tuple[int, int]] = []
    gather: list[int] = []
    scatter = [0] * sum(s.length for s in sequences)
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        longest = max(sequences[i].length for i in part)
        bucket.append((len(part), longest))
        for i in part:
            for t in range(longest):
                if t < sequences[i].length:
                    scatter[starts[i] + t] = len(gather)
                gather.append(starts[i] + min(t, sequences[i].length - 1))
    seg = [(start, s.length, start, s.length) for start, s in zip(starts, sequences, strict=True)]
    return PackedTables._make([*tables, _ints(seg, 4), _ints([0] * len(seg)), _ints(bucket, 2), _ints(gather), _ints(scatter), _ints([], 2)])


def decode_tables(lens: list[int], sequences: list[Request], blocks: list[tuple[int, int]]) -> DecodeTables:
    """Tables of a decode step in which row i has ``lens[i]`` keys and the blocks of ``sequences[i]``."""
    queries = [[(i, n - 1)] for i, n in enumerate(lens)]
    tables = block_tables(queries, [uses_of(s, blocks) for s in sequences], blocks)
    return DecodeTables._make([*tables, _ints(list(range(len(lens)))), _ints(lens)])


@dataclass(frozen=True)
class Problem:
    """A random attention problem; tensors fp64."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    do: Tensor
    tables: PackedTables
    scale: float

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype (the prefix stays in at least fp32, as trained prefixes do)."""
        own = torch.promote_types(dtype, torch.float32)
        q, k, v, do = (t.to(dtype) for t in (self.q, self.k, self.v, self.do))
        return Problem(q, k, v, self.prefix_k.to(dtype).to(own), self.prefix_v.to(dtype).to(own), do, self.tables, self.scale)

    def inputs(self) -> list[Tensor]:
        """q, k, v, prefix_k, prefix_v as fresh leaves."""
        return [t.detach().clone().requires_grad_() for t in (self.q, self.k, self.v, self.prefix_k, self.prefix_v)]


def problem(sequences: list[Request], block_lengths: list[int], *, num_heads: int, num_kv_heads: int, head_dim: int, seed: int = 0) -> Problem:
    """A random problem; blocks lie in the prefix tensor with gaps, so that a wrong row is seen."""
    g = torch.Generator().manual_seed(seed)
    blocks, row = [], 0
    for length in block_lengths:
        blocks.append((row, length))
        row += length + 3
    n = sum(s.length for s in sequences)
    shapes = [(n, num_heads, head_dim), *[(n, num_kv_heads, head_dim)] * 2, *[(max(row, 1), num_kv_heads, head_dim)] * 2, (n, num_heads, head_dim)]
    q, k, v, pk, pv, do = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    return Problem(q, k, v, pk, pv, do, packed_tables(sequences, blocks), head_dim**-0.5)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()
