"""What packed attention with a shared prefix is held against: torch's own attention on prefixes that were copied to every sequence, and two calls merged.

Every contender computes the same thing: B sequences of T tokens, each over its prefix of P rows and its own causal keys; the gradient of a prefix is the sum
over the sequences that share it. Shape letters: B sequences, T tokens, P prefix rows, n distinct prefixes, HQ query heads, H kv heads, D head dim, N = B * T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixfast.attention import ops
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.testing.tables import Request, packed_tables
from prefixfast_kernels.tile_configs import Backend


@dataclass(frozen=True)
class Shape:
    """One workload: ``sequences`` of ``tokens``, ``distinct`` prefixes of ``prefix`` rows dealt out in turn, (HQ, H, D)."""

    name: str
    sequences: int
    tokens: int
    prefix: int
    distinct: int
    heads: tuple[int, int, int]

    @property
    def flops(self) -> int:
        """Of the forward: two products over all visible (query, key) pairs."""
        pairs = self.sequences * (self.tokens * (self.tokens + 1) // 2 + self.tokens * self.prefix)
        return 4 * self.heads[2] * self.heads[0] * pairs

    def bytes(self, width: int) -> int:
        """Of the forward: every input read once, the output written once."""
        hq, h, d = self.heads
        n = self.sequences * self.tokens
        return width * (2 * n * hq * d + 2 * n * h * d + 2 * self.distinct * self.prefix * h * d) + 4 * n * hq


@dataclass(frozen=True)
class Inputs:
    """Leaves of one shape: q ``[N, HQ, D]``, k and v ``[N, H, D]``, prefix keys and values ``[n * P, H, D]``."""

    shape: Shape
    leaves: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    do: Tensor
    tables: PackedTables
    backend: Backend

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random numbers; needs what `ops.choose_backend` gives for the device."""
        hq, h, d = shape.heads
        g = torch.Generator().manual_seed(0)
        n, p = shape.sequences * shape.tokens, shape.distinct * shape.prefix
        sizes = ((n, hq, d), (n, h, d), (n, h, d), (p, h, d), (p, h, d), (n, hq, d))
        q, k, v, pk, pv, do = (torch.randn(s, generator=g).to(device, dtype) for s in sizes)
        backend = ops.choose_backend("auto", device, dtype, ((hq // h, d),))
        requests = [Request(shape.tokens, ((i % shape.distinct, True),)) for i in range(shape.sequences)]
        blocks = [(i * shape.prefix, shape.prefix) for i in range(shape.distinct)]
        tables = PackedTables(*(t.to(device) for t in packed_tables(requests, blocks, backend.sizes)))
        leaves = tuple(t.requires_grad_() for t in (q, k, v, pk, pv))
        return cls(shape, leaves, do, tables, Backend(backend.name, backend.sizes._replace(depth=1)))  # type: ignore[arg-type]

    def batched(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q ``[B, HQ, T, D]`` and keys and values with the prefix copied to every sequence ``[B, H, P + T, D]``."""
        q, k, v, pk, pv = self.leaves
        b, t = self.shape.sequences, self.shape.tokens
        own = [x.unflatten(0, (b, t)).transpose(1, 2) for x in (q, k, v)]
        which = torch.arange(b, device=q.device) % self.shape.distinct
        copies = [x.unflatten(0, (self.shape.distinct, self.shape.prefix))[which].transpose(1, 2) for x in (pk, pv)]
        return own[0], torch.cat([copies[0], own[1]], 2), torch.cat([copies[1], own[2]], 2)

    def packed(self, o: Tensor) -> Tensor:
        """``[B, HQ, T, D]`` -> ``[N, HQ, D]``."""
        return o.transpose(1, 2).flatten(0, 1)


Contender = Callable[[Inputs], Tensor]


def ours(x: Inputs) -> Tensor:
    """prefixfast: the prefix read where it lies."""
    q, k, v, pk, pv = x.leaves
    how = (x.shape.heads[2] ** -0.5, 0, 0.0, True, True, x.backend.name, list(x.backend.sizes))
    return ops.attn(q, k, v, pk, pv, list(x.tables), None, None, *how)[0]


def masked(x: Inputs) -> Tensor:
    """As transformers runs it with a past prefix: copies, an explicit mask, key and value heads repeated."""
    q, k, v = x.batched()
    group, p, t = q.shape[1] // k.shape[1], x.shape.prefix, x.shape.tokens
    k, v = (y.repeat_interleave(group, 1) for y in (k, v))
    mask = torch.ones(t, p + t, dtype=torch.bool, device=q.device).tril(p).expand(q.shape[0], 1, t, p + t)
    return x.packed(F.scaled_dot_product_attention(q, k, v, mask))


def sdpa(x: Inputs, kernel: str) -> Tensor:
    """Copied prefixes, one of torch's fused kernels forced (cuDNN's gets its mask as a tensor from torch)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = x.batched()
    if kernel == "EFFICIENT_ATTENTION":  # it knows no grouped heads
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return x.packed(
            F.scaled_dot_product_attention(
                q, k, v, causal_lower_right(q.shape[2], k.shape[2]), enable_gqa=q.shape[1] != k.shape[1]
            )
        )


def varlen(x: Inputs) -> Tensor:
    """Torch's variable-length flash operator on copied prefixes: the strongest way with copies."""
    q, k, v = (y.transpose(1, 2).flatten(0, 1) for y in x.batched())
    t, s = x.shape.tokens, x.shape.tokens + x.shape.prefix
    cu = [torch.arange(x.shape.sequences + 1, device=q.device, dtype=torch.int32) * n for n in (t, s)]
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *cu, t, s, 0.0, True, False, scale=x.shape.heads[2] ** -0.5
    )[0]


def cascade(x: Inputs) -> Tensor:
    """Two flash calls, one over the prefixes with all their queries and one over own keys, merged by log-sum-exp; the backward takes the merged statistics."""
    out: Tensor = _Cascade.apply(*x.leaves, x.shape)
    return out


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, shape: Shape) -> Tensor:
        """Own keys causal, prefixes not; queries sorted by prefix."""
        order = _order(shape, q.device)
        own_o, own_lse, own_state = _flash(q, k, v, shape, own=True)
        one = shape.distinct == 1  # then the order is that of the sequences
        prefix_o, prefix_lse, prefix_state = _flash(q if one else q[order], pk, pv, shape, own=False)
        po, pl = (
            (prefix_o, prefix_lse.T)
            if one
            else (prefix_o[_back(shape, q.device)], prefix_lse.T[_back(shape, q.device)])
        )
        ol = own_lse.T
        lse = torch.logaddexp(pl, ol)
        o = (po * (pl - lse).exp()[..., None] + own_o * (ol - lse).exp()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, pk, pv, o, lse, order, *own_state, *prefix_state)
        ctx.shape = shape
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Two flash backward calls with the merged output and statistics."""
        q, k, v, pk, pv, o, lse, order, rng0, unused0, rng1, unused1 = ctx.saved_tensors
        dq, dk, dv = _flash_backward(do, q, k, v, o, lse, ctx.shape, (rng0, unused0), own=True)
        one = ctx.shape.distinct == 1
        gdo, gq, go, gl = (do, q, o, lse) if one else (do[order], q[order], o[order], lse[order])
        pq, dpk, dpv = _flash_backward(gdo, gq, pk, pv, go, gl, ctx.shape, (rng1, unused1), own=False)
        return dq + (pq if one else pq[_back(ctx.shape, q.device)]), dk, dv, dpk, dpv, None


@functools.lru_cache(maxsize=32)
def _order(shape: Shape, device: torch.device) -> Tensor:
    which = torch.arange(shape.sequences, device=device) % shape.distinct
    return torch.argsort(which.repeat_interleave(shape.tokens), stable=True)


@functools.lru_cache(maxsize=32)
def _back(shape: Shape, device: torch.device) -> Tensor:
    return _order(shape, device).argsort()


@functools.lru_cache(maxsize=64)
def _lengths(shape: Shape, device: torch.device, *, own: bool) -> tuple[Tensor, Tensor, int, int]:
    if own:
        cu = torch.arange(shape.sequences + 1, device=device, dtype=torch.int32) * shape.tokens
        return cu, cu, shape.tokens, shape.tokens
    users = [len(range(i, shape.sequences, shape.distinct)) * shape.tokens for i in range(shape.distinct)]
    cu_q = torch.tensor([0, *users], device=device).cumsum(0).int()
    return (
        cu_q,
        torch.arange(shape.distinct + 1, device=device, dtype=torch.int32) * shape.prefix,
        max(users),
        shape.prefix,
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, shape: Shape, *, own: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    o, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_lengths(shape, q.device, own=own), 0.0, own, False, scale=shape.heads[2] ** -0.5
    )
    return o, lse, (rng, unused)


def _flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    shape: Shape,
    state: tuple[Tensor, Tensor],
    *,
    own: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (do.contiguous(), q, k, v, o, lse.T.contiguous(), *_lengths(shape, q.device, own=own), 0.0, own, *state)
    return torch.ops.aten._flash_attention_backward(*given, scale=shape.heads[2] ** -0.5)


@functools.lru_cache(maxsize=32)
def _flex_mask(shape: Shape, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    t, p, n = shape.tokens, shape.distinct * shape.prefix, shape.sequences * shape.tokens

    def seen(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prefix = (k < p) & (k // shape.prefix == (q // t) % shape.distinct)
        own = k - p
        return in_prefix | ((own >= 0) & (own // t == q // t) & (own <= q))

    return create_block_mask(seen, None, None, n, p + n, device=device)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(x: Inputs) -> Tensor:
    """FlexAttention, compiled: one axis of keys [all prefixes; all tokens] and a block mask, which is made once and not timed."""
    q, k, v, pk, pv = x.leaves
    keys, values = (torch.cat([a, b]).transpose(0, 1)[None] for a, b in ((pk, k), (pv, v)))
    out = _compiled_flex()(
        q.transpose(0, 1)[None],
        keys,
        values,
        block_mask=_flex_mask(x.shape, q.device),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


TRANSFORMERS = "copied prefix, mask (transformers)"
CONTENDERS: dict[str, Contender] = {
    "prefixfast": ours,
    TRANSFORMERS: masked,
    "copied prefix, flash": functools.partial(sdpa, kernel="FLASH_ATTENTION"),
    "copied prefix, efficient": functools.partial(sdpa, kernel="EFFICIENT_ATTENTION"),
    "copied prefix, cudnn": functools.partial(sdpa, kernel="CUDNN_ATTENTION"),
    "copied prefix, varlen flash": varlen,
    "two flash calls, merged": cascade,
    "FlexAttention": flex,
}
ON_CPU = ("prefixfast", TRANSFORMERS)
