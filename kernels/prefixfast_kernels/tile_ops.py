"""Functions that the Triton kernels share: loads and stores of packed rows, scores in base 2, and the online softmax.

A query tile packs the G query heads of one kv head: row r is token ``r // G``, head ``r % G``. Scores inside a kernel
are in units of log 2, because ``exp2`` is one instruction. The log-sum-exp outside a kernel is natural.
Shape letters: BM rows of a query tile, BN keys of a key tile, D head dim, DP D padded to a power of two,
G queries per kv head.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, live, stride, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, UP: tl.constexpr):
    """Load rows ``rows`` (int) of one head, ``[n, DP]``. Zeros fill what is beyond D and, with MASK, not ``live``."""
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
    if UP:  # Triton's interpreter cannot multiply bf16
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(base, x, rows, live, stride, D: tl.constexpr, DP: tl.constexpr):
    """Store ``x [n, DP]`` to rows ``rows`` of one head where ``live``."""
    d = tl.arange(0, DP)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def log2_scores(dot, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2 from dot products of queries and keys."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1) saturates to +-1 without NaN.
        s = softcap * LOG2E * (1 - 2 / (tl.exp2(dot * (scale * 2 * LOG2E / softcap)) + 1))
    else:
        s = dot * (scale * LOG2E)
    return s


@triton.jit
def softcap_grad(ds, s, softcap, SOFTCAP: tl.constexpr):
    """Gradient by the score before the cap, from ``ds``, the gradient by the capped score ``s`` (in units of log 2)."""
    if SOFTCAP:
        t = s / (softcap * LOG2E)
        ds = ds * (1 - t * t)
    return ds


@triton.jit
def biased(s, BIAS_TABLE, max_distance, head, distance, BIAS: tl.constexpr):
    """Scores (in units of log 2) plus the position bias of heads ``head`` at distances ``distance``.

    Scores, heads and distances have shapes that broadcast to that of the scores.
    """
    if BIAS:
        column = tl.minimum(tl.maximum(distance, -max_distance), max_distance) + max_distance
        s += tl.load(BIAS_TABLE + (head * (2 * max_distance + 1) + column)) * LOG2E
    return s


# fmt: off
@triton.jit
def load_query_tile(TILES, SEG, SEG_POS, t, hk, G: tl.constexpr, BM: tl.constexpr, TOKENS: tl.constexpr):
    """Read the entry of query tile ``t``.

    Returns the segment, its first key, its number of keys, the tile's number of tokens, the position of its first
    query, and of each row ``[BM]`` whether it is in use, its query row, head and position.
    """
    s = tl.load(TILES + 2 * t)
    row = tl.load(TILES + 2 * t + 1)
    first = tl.load(SEG + 4 * s)
    key0 = tl.load(SEG + 4 * s + 2)
    keys = tl.load(SEG + 4 * s + 3)
    tokens = tl.minimum(first + tl.load(SEG + 4 * s + 1) - row, TOKENS)
    pos = tl.load(SEG_POS + s) + row - first
    r = tl.arange(0, BM)
    return s, key0, keys, tokens, pos, r // G < tokens, row + r // G, hk * G + r % G, pos + r // G


@triton.jit
def key_range(pos, tokens, keys, window, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that a tile's queries see: first key, end of the whole tiles that need no mask, end of all keys."""
    lo = 0
    hi = keys
    full = keys // BN * BN
    if CAUSAL:
        hi = tl.minimum(pos + tokens, keys)
        full = tl.minimum(pos + 1, keys) // BN * BN
    if WINDOW:  # every key tile needs a mask
        lo = tl.maximum(pos - window + 1, 0) // BN * BN
        full = lo
    return lo, full, hi


@triton.jit
def key_rows(SLOTS, key0, key, hi, ARENA: tl.constexpr, MASK: tl.constexpr):
    """Row of each key ``key`` in the key tensor: its place in order or, with ARENA, its entry of SLOTS."""
    at = key0 + key
    if ARENA and MASK:
        at = tl.load(SLOTS + at, mask=key < hi, other=0)
    elif ARENA:
        at = tl.load(SLOTS + at)
    return at


@triton.jit
def visible_keys(key, hi, qpos, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether each query sees each key, ``[BM, BN]``."""
    seen = (key < hi)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= qpos[:, None])
    if WINDOW:
        seen = seen & (key[None, :] > (qpos - window)[:, None])
    return tl.broadcast_to(seen, (BM, BN))


@triton.jit
def online_softmax_update(
    acc, m, l, q, K, V, rows, live, seen, stride_k, stride_v, scale, softcap,
    BIAS_TABLE, max_distance, head, qpos, kpos,
    D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, MAY_SEE_NONE: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """Add one key tile to the online softmax of a query tile: ``acc [BM, DP]``, maximum ``m`` and sum ``l`` ``[BM]``.

    MASK: only the ``live`` key rows are read, and ``seen [BM, BN]`` says which keys each query sees.
    MAY_SEE_NONE: a query may see no key of the tile.
    BIAS: the position bias of heads ``head [BM]`` at distances ``kpos - qpos``, ``[BN]`` and ``[BM]``, is added.
    """
    k = load_rows(K, rows, live, stride_k, D, DP, MASK, UP).to(q.dtype)
    s = log2_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP)
    s = biased(s, BIAS_TABLE, max_distance, head[:, None], kpos[None, :] - qpos[:, None], BIAS)
    if MASK:
        s = tl.where(seen, s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 1))
    if MAY_SEE_NONE:  # the maximum of a query that has seen no key yet is -inf, and a shift by 0 avoids -inf - -inf
        shift = tl.where(new == -float("inf"), 0.0, new)
    else:
        shift = new
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(m - shift)
    l = l * decay + tl.sum(p, 1)
    v = load_rows(V, rows, live, stride_v, D, DP, MASK, UP).to(q.dtype)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new, l


@triton.jit
def store_output(
    O, LSE, acc, m, l, row, head, live, stride_ot, stride_oh, HQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Store the results of query rows ``row`` and heads ``head``, 0 and -inf where no key was visible."""
    nothing = l == 0
    out = acc / tl.where(nothing, 1.0, l)[:, None]
    store_rows(O + head[:, None].to(tl.int64) * stride_oh, out, row, live, stride_ot, D, DP)
    lse = tl.where(nothing, -float("inf"), m * LN2 + tl.log(tl.where(nothing, 1.0, l)))
    tl.store(LSE + row.to(tl.int64) * HQ + head, lse, mask=live)
# fmt: on
