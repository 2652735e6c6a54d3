"""Pieces that the Triton kernels share: loads of packed rows, and scores in base 2.

Shape letters: BM rows of a query tile, BN keys of a key tile, D head dim, DP D padded to a power of two, G queries per kv head.
A query tile packs the G query heads of one kv head: row r is token ``r // G``, head ``r % G``. Scores inside a kernel are in units of log 2 (``exp2`` is one
instruction); the log-sum-exp outside is natural.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, live, stride, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr):
    """``[n, DP]``: the rows ``rows`` (int) of one head; zeros beyond D and, with MASK, where ``live`` is false."""
    d = tl.arange(0, DP)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if MASK and D != DP:
        x = tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    elif MASK:
        x = tl.load(at, mask=live[:, None], other=0.0)
    elif D != DP:
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    if UP:  # the interpreter cannot multiply bf16
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(base, x, rows, live, stride, D: tl.constexpr, DP: tl.constexpr):
    """Store ``[n, DP]`` to rows where ``live``."""
    d = tl.arange(0, DP)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def scaled(dot, scale, softcap, SOFTCAP: tl.constexpr):
    """Dot products -> scores in units of log 2."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); saturates to +-1 without NaN
        s = softcap * LOG2E * (1 - 2 / (tl.exp2(dot * (scale * 2 * LOG2E / softcap)) + 1))
    else:
        s = dot * (scale * LOG2E)
    return s


@triton.jit
def uncapped(ds, s, softcap, SOFTCAP: tl.constexpr):
    """Gradient of the capped score (``s``, in units of log 2) -> of the score before the cap."""
    if SOFTCAP:
        t = s / (softcap * LOG2E)
        ds = ds * (1 - t * t)
    return ds
