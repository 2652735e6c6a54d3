"""Triton kernels of the backward over query tiles: row sums of output times gradient, and dQ (`prefix_bwd`).

A tile packs the G query heads of one kv head: row r is token ``r // G``, head ``r % G``.
Shape letters: N packed queries, HQ query heads, BM rows of a query tile, D head dim, DP D padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefixfast_kernels.tile_ops import (
    LOG2E,
    biased,
    key_range,
    key_rows,
    load_query_tile,
    load_rows,
    log2_scores,
    softcap_grad,
    store_rows,
    visible_keys,
)


# fmt: off
@triton.jit
def prefix_bwd_delta(
    O, DO, DELTA, rows, stride_ot, stride_oh, stride_dot, stride_doh,
    HQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):
    """Row sums ``DELTA [N, HQ]`` of ``O * DO``, BM (query, head) pairs in one program."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    live = r < rows
    row, head = r // HQ, (r % HQ).to(tl.int64)[:, None]
    o = load_rows(O + head * stride_oh, row, live, stride_ot, D, DP, True, True)
    do = load_rows(DO + head * stride_doh, row, live, stride_dot, D, DP, True, True)
    tl.store(DELTA + r, tl.sum(o * do, 1), mask=live)


@triton.jit
def add_dq(
    dq, q, do, lse2, delta, K, V, rows, live, seen, stride_k, stride_v, scale, softcap,
    BIAS_TABLE, max_distance, head, qpos, kpos,
    D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """Add the part of one key tile to dQ ``[BM, DP]`` (without the scale)."""
    k = load_rows(K, rows, live, stride_k, D, DP, MASK, UP)
    v = load_rows(V, rows, live, stride_v, D, DP, MASK, UP)
    s = log2_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP)
    s = biased(s, BIAS_TABLE, max_distance, head[:, None], kpos[None, :] - qpos[:, None], BIAS)
    p = tl.exp2(s - lse2[:, None])
    if MASK:
        p = tl.where(seen, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    ds = softcap_grad(ds, s, softcap, SOFTCAP)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def prefix_bwd_dq(
    Q, K, V, PK, PV, DO, LSE, DELTA, DQ, PART, TILES, SEG, SEG_POS, USE_INDPTR, USE, BLOCK, SLOTS, BIAS_TABLE,
    scale, softcap, window, max_distance,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    stride_dot, stride_doh, stride_dqt, stride_dqh,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TOKENS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    PREFIX: tl.constexpr, FUSED: tl.constexpr, ARENA: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """DQ of one tile of at most TOKENS query tokens, one kv head.

    FUSED: ``PART [N, HQ, D]`` already holds the part of the prefix.
    """
    t = tl.program_id(0)
    hk = tl.program_id(1)
    s, key0, keys, tokens, pos, live, qrow, head, qpos = load_query_tile(TILES, SEG, SEG_POS, t, hk, G, BM, TOKENS)
    n = tl.arange(0, BN)
    far = head[:, None].to(tl.int64)
    q = load_rows(Q + far * stride_qh, qrow, live, stride_qt, D, DP, True, UP)
    do = load_rows(DO + far * stride_doh, qrow, live, stride_dot, D, DP, True, UP)
    stat = qrow.to(tl.int64) * HQ + head
    lse2 = tl.load(LSE + stat, mask=live, other=0.0) * LOG2E
    delta = tl.load(DELTA + stat, mask=live, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)
    use0 = tl.load(USE_INDPTR + s)
    use1 = tl.load(USE_INDPTR + s + 1)

    if PREFIX and FUSED:
        if use1 > use0:
            dq = load_rows(PART + far * D, qrow, live, HQ * D, D, DP, True, True)
    elif PREFIX:
        PKh = PK + hk.to(tl.int64) * stride_pkh
        PVh = PV + hk.to(tl.int64) * stride_pvh
        for u in range(use0, use1):
            block = tl.load(USE + 3 * u)
            start = tl.load(BLOCK + 2 * block)
            length = tl.load(BLOCK + 2 * block + 1)
            at = tl.load(USE + 3 * u + 1)
            lo = 0
            if WINDOW:
                slides = tl.load(USE + 3 * u + 2)
                lo = tl.where(slides != 0, tl.maximum(pos - window + 1 - at, 0) // BN * BN, 0)
            for j in range(lo, length, BN):
                seen = tl.broadcast_to(((j + n) < length)[None, :], (BM, BN))
                if WINDOW:
                    seen = seen & ((slides == 0) | ((at + j + n)[None, :] > (qpos - window)[:, None]))
                dq = add_dq(
                    dq, q, do, lse2, delta, PKh, PVh, start + j + n, j + n < length, seen, stride_pkt, stride_pvt,
                    scale, softcap, BIAS_TABLE, max_distance, head, qpos, at + j + n,
                    D, DP, True, SOFTCAP, BIAS, PRECISION, UP)

    Kh = K + hk.to(tl.int64) * stride_kh
    Vh = V + hk.to(tl.int64) * stride_vh
    lo, full, hi = key_range(pos, tokens, keys, window, BN, CAUSAL, WINDOW)
    for j in range(lo, full, BN):
        at = key_rows(SLOTS, key0, j + n, hi, ARENA, False)
        dq = add_dq(
            dq, q, do, lse2, delta, Kh, Vh, at, live, live, stride_kt, stride_vt,
            scale, softcap, BIAS_TABLE, max_distance, head, qpos, j + n, D, DP, False, SOFTCAP, BIAS, PRECISION, UP)
    for j in range(full, hi, BN):
        at = key_rows(SLOTS, key0, j + n, hi, ARENA, True)
        seen = visible_keys(j + n, hi, qpos, window, BM, BN, CAUSAL, WINDOW)
        dq = add_dq(
            dq, q, do, lse2, delta, Kh, Vh, at, j + n < hi, seen, stride_kt, stride_vt,
            scale, softcap, BIAS_TABLE, max_distance, head, qpos, j + n, D, DP, True, SOFTCAP, BIAS, PRECISION, UP)
    store_rows(DQ + far * stride_dqh, dq * scale, qrow, live, stride_dqt, D, DP)
# fmt: on
