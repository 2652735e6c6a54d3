"""Workloads of decode attention: shapes, and random tensors with their tables.

Shape letters: R rows, S own keys, P prefix rows, n distinct prefixes, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixfast.attention import ops
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.decode_cases import MODES
from prefixfast_kernels.testing.decode_work import with_work
from prefixfast_kernels.testing.tables import Request, decode_tables


@dataclass(frozen=True)
class Shape:
    """One decode step, in which neighbouring rows share a prefix.

    Attributes:
        name: Name in tables.
        rows: Number of rows.
        prefix: Rows of each prefix.
        keys: Own keys of each row.
        distinct: Number of distinct prefixes.
        heads: Query heads, kv heads and head dim.
    """

    name: str
    rows: int
    prefix: int
    keys: int
    distinct: int
    heads: tuple[int, int, int]

    def bytes(self, width: int) -> int:
        """Bytes of a step: every key and value read once, q read and o written, with ``width`` bytes a number."""
        hq, h, d = self.heads
        return width * d * (2 * self.rows * hq + 2 * h * (self.rows * self.keys + self.distinct * self.prefix))


@dataclass(frozen=True)
class Inputs:
    """Tensors of one step. The arena holds the prefixes, then the slots of all rows in random order.

    Attributes:
        q: Queries ``[R, HQ, D]``.
        k: Keys of the arena ``[arena rows, H, D]``.
        v: Values of the arena ``[arena rows, H, D]``.
        table: Arena rows of each row's own keys ``[R, S]``, int32.
        rows: Arena rows of each row's prefix and own keys ``[R, P + S]``.
        tables: Tables by mode of `decode_cases.MODES`.
        users: Largest number of rows in a group's tile, 0 for no work tables.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    rows: Tensor
    tables: dict[str, DecodeTables]
    users: int

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random numbers, with the backend that `ops.choose_backend` chooses for the device."""
        hq, h, d = shape.heads
        g = torch.Generator().manual_seed(0)
        first = shape.distinct * shape.prefix
        count = first + shape.rows * shape.keys
        q, k, v = (
            torch.randn(s, generator=g).to(device, dtype) for s in ((shape.rows, hq, d), (count, h, d), (count, h, d))
        )
        table = (
            first + torch.randperm(shape.rows * shape.keys // 16, generator=g)[:, None] * 16 + torch.arange(16)
        ).view(shape.rows, shape.keys)
        which = torch.arange(shape.rows) * shape.distinct // shape.rows
        blocks = [(i * shape.prefix, shape.prefix) for i in range(shape.distinct)]
        plain = decode_tables([shape.keys] * shape.rows, [Request(0, ((b, True),)) for b in which.tolist()], blocks)
        cut = ops.choose_backend("auto", device, dtype, ((hq // h, d),), h).decode
        modes = {m: with_work(plain, cut._replace(**change)) if cut.users else plain for m, change in MODES.items()}
        rows = torch.cat([which[:, None] * shape.prefix + torch.arange(shape.prefix), table], 1)
        tables = {m: DecodeTables(*(x.to(device) for x in t)) for m, t in modes.items()}
        return cls(q, k, v, table.int().to(device), rows.to(device), tables, cut.users)

    def ours(self, backend: str, mode: str) -> Tensor:
        """Output ``[R, HQ, D]`` of `ops.attn_decode`."""
        given = (self.q, self.k, self.v, None, None, self.table, list(self.tables[mode]), None, self.table.shape[1])
        return ops.attn_decode(*given, self.q.shape[2] ** -0.5, 0, 0.0, backend, self.users)[0]

    def copied(self) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of every row, prefixes included, ``[R, H, P + S, D]`` each."""
        flat = self.rows.flatten()
        return tuple(a.index_select(0, flat).unflatten(0, self.rows.shape).transpose(1, 2) for a in (self.k, self.v))

    def sdpa(self, k: Tensor, v: Tensor) -> Tensor:
        """Output ``[R, HQ, D]`` of torch's attention. A kv head's queries are its rows, so that no head is repeated."""
        hq, h = self.q.shape[1], k.shape[1]
        return F.scaled_dot_product_attention(self.q.unflatten(1, (h, hq // h)), k, v).flatten(1, 2)
