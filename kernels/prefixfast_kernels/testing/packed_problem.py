"""Random problems of packed attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnInputs
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.testing.tables import SMALL_TILES, Request, packed_tables
from prefixfast_kernels.tile_selection import TileSizes


@dataclass(frozen=True)
class PackedProblem:
    """Inputs of packed attention and the gradient of its output, made in fp64.

    Attributes:
        q: Queries ``[N, HQ, D]``.
        k: Keys ``[M, H, D]``.
        v: Values ``[M, H, D]``.
        prefix_k: Prefix keys ``[rows, H, D]``.
        prefix_v: Prefix values ``[rows, H, D]``.
        do: Gradient of the output ``[N, HQ, D]``.
        tables: Tables of the problem.
        scale: Factor on the scores.
        slots: Rows of ``k`` in which the keys lie, or None if they lie in order.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, or None.
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
    bias: Tensor | None = None

    @property
    def inputs(self) -> AttnInputs:
        """Inputs of the attention."""
        return AttnInputs(self.q, self.k, self.v, self.prefix_k, self.prefix_v, self.slots)

    def cast(self, dtype: torch.dtype) -> PackedProblem:
        """The same problem in another dtype. Prefix and bias stay in at least fp32, as trained prefixes do."""
        own = torch.promote_types(dtype, torch.float32)
        q, k, v, do = (t.to(dtype) for t in (self.q, self.k, self.v, self.do))
        pk, pv = (t.to(dtype).to(own) for t in (self.prefix_k, self.prefix_v))
        bias = None if self.bias is None else self.bias.to(own)
        return replace(self, q=q, k=k, v=v, do=do, prefix_k=pk, prefix_v=pv, bias=bias)

    def to(self, device: torch.device | str) -> PackedProblem:
        """The same problem on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved, tables=PackedTables(*(t.to(device) for t in self.tables)))

    def leaves(self) -> list[Tensor]:
        """Copies of q, k, v, prefix_k and prefix_v that require gradients."""
        return [t.detach().clone().requires_grad_() for t in (self.q, self.k, self.v, self.prefix_k, self.prefix_v)]


def make_problem(
    requests: list[Request],
    block_lengths: list[int],
    heads: tuple[int, int, int],
    *,
    sizes: TileSizes = SMALL_TILES,
    arena: bool = False,
    max_distance: int = 0,
    seed: int = 0,
) -> PackedProblem:
    """A random problem.

    Args:
        requests: Requests in the order in which they are packed.
        block_lengths: Number of rows of each block. Blocks lie in the prefix tensor with gaps between them, so that a
            wrong row changes the result.
        heads: Query heads, kv heads and head dim.
        sizes: Tile sizes that the tables are cut into.
        arena: Whether the keys lie scattered among unused rows, with ``slots``.
        max_distance: Largest distance of the position bias, 0 for no bias.
        seed: Seed of the random numbers.
    """
    num_heads, num_kv_heads, head_dim = heads
    g = torch.Generator().manual_seed(seed)
    blocks, row = [], 0
    for length in block_lengths:
        blocks.append((row, length))
        row += length + 3
    n, m = sum(r.length for r in requests), sum(r.num_keys for r in requests)
    slots = torch.randperm(m + 9, generator=g)[:m].int() if arena else None
    keys = (m + 9 if arena else m, num_kv_heads, head_dim)
    prefix = (max(row, 1), num_kv_heads, head_dim)
    queries = (n, num_heads, head_dim)
    q, k, v, pk, pv, do = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in (queries, keys, keys, prefix, prefix, queries)
    )
    bias = None
    if max_distance:
        bias = torch.randn(num_heads, 2 * max_distance + 1, generator=g, dtype=torch.float64)
    return PackedProblem(q, k, v, pk, pv, do, packed_tables(requests, blocks, sizes), head_dim**-0.5, slots, bias)
