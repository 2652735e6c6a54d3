"""Workloads of packed attention: shapes, and random tensors with their tables.

Shape letters: B sequences, T tokens, P prefix rows, n distinct prefixes, HQ query heads, H kv heads, D head dim, N =
B * T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast.attention import ops
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.testing.tables import Request, packed_tables
from prefixfast_kernels.tile_selection import Backend


@dataclass(frozen=True)
class Shape:
    """One workload, whose sequences use the distinct prefixes in turn.

    Attributes:
        name: Name in tables.
        sequences: Number of sequences.
        tokens: Tokens of each sequence.
        prefix: Rows of each prefix.
        distinct: Number of distinct prefixes.
        heads: Query heads, kv heads and head dim.
    """

    name: str
    sequences: int
    tokens: int
    prefix: int
    distinct: int
    heads: tuple[int, int, int]

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward: two products over all visible pairs of query and key."""
        pairs = self.sequences * (self.tokens * (self.tokens + 1) // 2 + self.tokens * self.prefix)
        return 4 * self.heads[2] * self.heads[0] * pairs

    def bytes(self, width: int) -> int:
        """Bytes of the forward: every input read once, the output written once, with ``width`` bytes a number."""
        hq, h, d = self.heads
        n = self.sequences * self.tokens
        return width * (2 * n * hq * d + 2 * n * h * d + 2 * self.distinct * self.prefix * h * d) + 4 * n * hq


@dataclass(frozen=True)
class Inputs:
    """Tensors of one shape.

    Attributes:
        shape: The workload.
        leaves: q ``[N, HQ, D]``, k and v ``[N, H, D]``, prefix keys and values ``[n * P, H, D]``.
        do: Gradient of the output ``[N, HQ, D]``.
        tables: Tables of the packed batch.
        backend: Backend and tile sizes of prefixfast.
    """

    shape: Shape
    leaves: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    do: Tensor
    tables: PackedTables
    backend: Backend

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random numbers, with the backend that `ops.choose_backend` chooses for the device."""
        hq, h, d = shape.heads
        g = torch.Generator().manual_seed(0)
        n, p = shape.sequences * shape.tokens, shape.distinct * shape.prefix
        sizes = ((n, hq, d), (n, h, d), (n, h, d), (p, h, d), (p, h, d), (n, hq, d))
        q, k, v, pk, pv, do = (torch.randn(s, generator=g).to(device, dtype) for s in sizes)
        backend = ops.choose_backend("auto", device, dtype, ((hq // h, d),))
        requests = [Request(shape.tokens, ((i % shape.distinct, True),)) for i in range(shape.sequences)]
        blocks = [(i * shape.prefix, shape.prefix) for i in range(shape.distinct)]
        tables = PackedTables(*(t.to(device) for t in packed_tables(requests, blocks, backend.sizes)))
        for leaf in (q, k, v, pk, pv):
            leaf.requires_grad_()
        backend = Backend(backend.name, backend.sizes._replace(depth=1))
        return cls(shape, (q, k, v, pk, pv), do, tables, backend)

    def batched(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, HQ, T, D]``, and keys and values ``[B, H, P + T, D]`` with copies of the prefix."""
        q, k, v, pk, pv = self.leaves
        b, t = self.shape.sequences, self.shape.tokens
        own = [x.unflatten(0, (b, t)).transpose(1, 2) for x in (q, k, v)]
        which = torch.arange(b, device=q.device) % self.shape.distinct
        copies = [x.unflatten(0, (self.shape.distinct, self.shape.prefix))[which].transpose(1, 2) for x in (pk, pv)]
        return own[0], torch.cat([copies[0], own[1]], 2), torch.cat([copies[1], own[2]], 2)

    def packed(self, o: Tensor) -> Tensor:
        """Packed output ``[N, HQ, D]`` of a batched one ``[B, HQ, T, D]``."""
        return o.transpose(1, 2).flatten(0, 1)
