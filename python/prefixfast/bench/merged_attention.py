"""Attention with shared prefixes as two flash calls, over prefixes and over own keys, merged by log-sum-exp.

Shape letters: T tokens, P prefix rows, n distinct prefixes, HQ query heads, H kv heads, D head dim, N tokens of all
sequences.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixfast.bench.attention_inputs import Inputs, Shape


def merged(x: Inputs) -> Tensor:
    """Output ``[N, HQ, D]`` of two flash calls, merged. Their backward calls take the merged statistics."""
    out: Tensor = _Merged.apply(x.shape, *x.leaves)
    return out


class _FlashCall(NamedTuple):
    """Tensors of one flash call.

    Attributes:
        q: Queries ``[N, HQ, D]``.
        k: Keys ``[rows, H, D]``.
        v: Values ``[rows, H, D]``.
        o: Output ``[N, HQ, D]``.
        lse: Log-sum-exp ``[N, HQ]``.
        state: The call's random-number state and unused tensor, which its backward call takes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    state: tuple[Tensor, Tensor]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Shape, *leaves: Tensor) -> Tensor:
        """Merge a causal call over own keys and a call over the prefixes, whose queries are sorted by prefix."""
        q, k, v, pk, pv = leaves
        order = _order(shape, q.device)
        own_o, own_lse, own_state = _flash((q, k, v), shape, own=True)
        one = shape.distinct == 1  # the sorted order is the order of the sequences
        prefix_o, prefix_lse, prefix_state = _flash((q if one else q[order], pk, pv), shape, own=False)
        po, pl = prefix_o, prefix_lse.T
        if not one:
            back = _order_back(shape, q.device)
            po, pl = po[back], pl[back]
        ol = own_lse.T
        lse = torch.logaddexp(pl, ol)
        o = (po * (pl - lse).exp()[..., None] + own_o * (ol - lse).exp()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, pk, pv, o, lse, order, *own_state, *prefix_state)
        ctx.shape = shape
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Call flash's backward twice with the merged output and statistics."""
        q, k, v, pk, pv, o, lse, order, *states = ctx.saved_tensors
        shape: Shape = ctx.shape
        own = _FlashCall(q, k, v, o, lse, (states[0], states[1]))
        dq, dk, dv = _flash_backward(own, do, shape, own=True)
        one = shape.distinct == 1
        gdo, gq, go, gl = (do, q, o, lse) if one else (do[order], q[order], o[order], lse[order])
        prefix = _FlashCall(gq, pk, pv, go, gl, (states[2], states[3]))
        pq, dpk, dpv = _flash_backward(prefix, gdo, shape, own=False)
        return None, dq + (pq if one else pq[_order_back(shape, q.device)]), dk, dv, dpk, dpv


@functools.lru_cache(maxsize=32)
def _order(shape: Shape, device: torch.device) -> Tensor:
    """Tokens sorted by prefix, ``[N]``."""
    which = torch.arange(shape.sequences, device=device) % shape.distinct
    return torch.argsort(which.repeat_interleave(shape.tokens), stable=True)


@functools.lru_cache(maxsize=32)
def _order_back(shape: Shape, device: torch.device) -> Tensor:
    """Inverse of `_order`, ``[N]``."""
    return _order(shape, device).argsort()


@functools.lru_cache(maxsize=64)
def _lengths(shape: Shape, device: torch.device, *, own: bool) -> tuple[Tensor, Tensor, int, int]:
    """Offsets of queries and of keys in a flash call, and the largest numbers of both."""
    if own:
        cu = torch.arange(shape.sequences + 1, device=device, dtype=torch.int32) * shape.tokens
        return cu, cu, shape.tokens, shape.tokens
    queries = [len(range(i, shape.sequences, shape.distinct)) * shape.tokens for i in range(shape.distinct)]
    cu_q = torch.tensor([0, *queries], device=device).cumsum(0).int()
    cu_k = torch.arange(shape.distinct + 1, device=device, dtype=torch.int32) * shape.prefix
    return cu_q, cu_k, max(queries), shape.prefix


def _flash(
    qkv: tuple[Tensor, Tensor, Tensor], shape: Shape, *, own: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Output ``[N, HQ, D]``, log-sum-exp ``[HQ, N]`` and state of one flash call."""
    lengths = _lengths(shape, qkv[0].device, own=own)
    o, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        *qkv, *lengths, 0.0, own, False, scale=shape.heads[2] ** -0.5
    )
    return o, lse, (rng, unused)


def _flash_backward(call: _FlashCall, do: Tensor, shape: Shape, *, own: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of one flash call."""
    statistics = (call.o, call.lse.T.contiguous(), *_lengths(shape, do.device, own=own))
    given = (do.contiguous(), call.q, call.k, call.v, *statistics, 0.0, own, *call.state)
    return torch.ops.aten._flash_attention_backward(*given, scale=shape.heads[2] ** -0.5)
