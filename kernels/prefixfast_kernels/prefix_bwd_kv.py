"""Triton kernels of the backward over tiles of keys or prefix rows (`prefix_bwd`).

They compute dK and dV of own keys and of prefix blocks, and sum a block's partial gradients in a fixed order.
Shape letters: BN keys or prefix rows of a tile, BM rows of a query tile, NS slices of a block's users, N packed
queries, HQ query heads, H kv heads, D head dim, DP D padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefixfast_kernels.tile_ops import LOG2E, biased, load_rows, log2_scores, softcap_grad, store_rows


# fmt: off
@triton.jit
def add_dkv(
    dk, dv, k, v, Q, DO, LSE, DELTA, qrow, head, live, seen, stride_qt, stride_qh, stride_dot, stride_doh,
    scale, softcap, BIAS_TABLE, max_distance, qpos, kpos,
    HQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """Add the part of one query tile to dK (without the scale) and dV ``[BN, DP]``.

    ``seen [BN, BM]`` says which queries see each key. Returns dK, dV, and dS ``[BN, BM]``, from which dQ follows.
    """
    far = head[:, None].to(tl.int64)
    q = load_rows(Q + far * stride_qh, qrow, live, stride_qt, D, DP, True, UP)
    do = load_rows(DO + far * stride_doh, qrow, live, stride_dot, D, DP, True, UP)
    stat = qrow.to(tl.int64) * HQ + head
    lse2 = tl.load(LSE + stat, mask=live, other=0.0) * LOG2E
    delta = tl.load(DELTA + stat, mask=live, other=0.0)
    s = log2_scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, SOFTCAP)
    s = biased(s, BIAS_TABLE, max_distance, head[None, :], kpos[:, None] - qpos[None, :], BIAS)
    p = tl.where(seen, tl.exp2(s - lse2[None, :]), 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    ds = softcap_grad(ds, s, softcap, SOFTCAP)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, ds


@triton.jit
def prefix_bwd_kv(
    Q, K, V, DO, LSE, DELTA, DK, DV, KEY_TILES, SEG, SEG_POS, SLOTS, BIAS_TABLE,
    scale, softcap, window, max_distance,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dkt, stride_dkh,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TOKENS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    ARENA: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """DK and dV of one tile of BN keys, one kv head, over every segment that sees the keys."""
    t = tl.program_id(0)
    hk = tl.program_id(1)
    s0 = tl.load(KEY_TILES + 3 * t)
    s1 = tl.load(KEY_TILES + 3 * t + 1)
    key = tl.load(KEY_TILES + 3 * t + 2)  # position of the tile's first key
    key0 = tl.load(SEG + 4 * s0 + 2)
    total = tl.load(SEG + 4 * s1 - 1)  # keys of the last segment
    r = tl.arange(0, BM)
    kpos = key + tl.arange(0, BN)
    inside = kpos < total
    krow = key0 + kpos
    if ARENA:
        krow = tl.load(SLOTS + krow, mask=inside, other=0)
    head = hk * G + r % G
    hk64 = hk.to(tl.int64)
    k = load_rows(K + hk64 * stride_kh, krow, inside, stride_kt, D, DP, True, UP)
    v = load_rows(V + hk64 * stride_vh, krow, inside, stride_vt, D, DP, True, UP)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for s in range(s0, s1):
        row = tl.load(SEG + 4 * s)
        rows = tl.load(SEG + 4 * s + 1)
        keys = tl.load(SEG + 4 * s + 3)
        pos = tl.load(SEG_POS + s)
        lo = 0
        hi = tl.where(key < keys, rows, 0)
        if CAUSAL:  # the first query at or after the tile's first key
            lo = tl.maximum(key - pos, 0) // TOKENS * TOKENS
        if WINDOW:  # the last query that still sees the tile's last key
            hi = tl.minimum(hi, key + BN - 1 + window - pos)
        for i in range(lo, hi, TOKENS):
            token = i + r // G
            live = (token < rows) & (r // G < TOKENS)
            seen = live[None, :] & (kpos < keys)[:, None]
            if CAUSAL:
                seen = seen & (kpos[:, None] <= (pos + token)[None, :])
            if WINDOW:
                seen = seen & (kpos[:, None] > (pos + token - window)[None, :])
            dk, dv, _ = add_dkv(
                dk, dv, k, v, Q, DO, LSE, DELTA, row + token, head, live, seen, stride_qt, stride_qh, stride_dot,
                stride_doh, scale, softcap, BIAS_TABLE, max_distance, pos + token, kpos,
                HQ, D, DP, SOFTCAP, BIAS, PRECISION, UP)
    store_rows(DK + hk64 * stride_dkh, dk * scale, krow, inside, stride_dkt, D, DP)
    store_rows(DV + hk64 * stride_dkh, dv, krow, inside, stride_dkt, D, DP)


@triton.jit
def prefix_bwd_block(
    Q, PK, PV, DO, LSE, DELTA, PARTS_K, PARTS_V, PART, BLOCK_TILES, BLOCK, USER_INDPTR, USER, USER_POS, USER_SLIDES,
    BIAS_TABLE, scale, softcap, window, max_distance,
    stride_qt, stride_qh, stride_pkt, stride_pkh, stride_pvt, stride_pvh, stride_dot, stride_doh,
    HQ: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """DK and dV of one tile of prefix rows, one kv head, over one slice of the block's users.

    Writes ``PARTS_K`` and ``PARTS_V [NS, tiles, BN, H, D]`` (fp32). FUSED: also writes the prefix part of dQ (without
    the scale) of the slice's users to ``PART [N, HQ, D]`` (fp32).
    """
    t = tl.program_id(0)
    hk = tl.program_id(1)
    part = tl.program_id(2)
    block = tl.load(BLOCK_TILES + 2 * t)
    j = tl.load(BLOCK_TILES + 2 * t + 1)
    start = tl.load(BLOCK + 2 * block)
    length = tl.load(BLOCK + 2 * block + 1)
    user0 = tl.load(USER_INDPTR + block)
    user1 = tl.load(USER_INDPTR + block + 1)
    share = tl.cdiv(tl.cdiv(user1 - user0, TOKENS), tl.num_programs(2)) * TOKENS
    lo = user0 + part * share
    hi = tl.minimum(lo + share, user1)
    r = tl.arange(0, BM)
    n = j + tl.arange(0, BN)
    inside = n < length
    head = hk * G + r % G
    hk64 = hk.to(tl.int64)
    k = load_rows(PK + hk64 * stride_pkh, start + n, inside, stride_pkt, D, DP, True, UP)
    v = load_rows(PV + hk64 * stride_pvh, start + n, inside, stride_pvt, D, DP, True, UP)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for i in range(lo, hi, TOKENS):
        user = i + r // G
        live = (user < hi) & (r // G < TOKENS)
        row = tl.load(USER + user, mask=live, other=0)
        seen = live[None, :] & inside[:, None]
        pos = tl.load(USER_POS + user, mask=live, other=0)
        if WINDOW:
            slides = tl.load(USER_SLIDES + user, mask=live, other=0)
            seen = seen & ((slides == 0)[None, :] | (pos[None, :] + n[:, None] > -window))
        dk, dv, ds = add_dkv(
            dk, dv, k, v, Q, DO, LSE, DELTA, row, head, live, seen, stride_qt, stride_qh, stride_dot, stride_doh,
            scale, softcap, BIAS_TABLE, max_distance, -pos, n, HQ, D, DP, SOFTCAP, BIAS, PRECISION, UP)
        if FUSED:
            dq = tl.dot(tl.trans(ds).to(k.dtype), k, input_precision=PRECISION)
            store_rows(PART + head[:, None].to(tl.int64) * D, dq, row, live, HQ * D, D, DP)
    tiles = tl.num_programs(0)
    out = ((part * tiles + t) * BN + tl.arange(0, BN)) * H + hk
    store_rows(PARTS_K, dk * scale, out, inside, D, D, DP)
    store_rows(PARTS_V, dv, out, inside, D, D, DP)


@triton.jit
def prefix_bwd_sum(
    PARTS_K, PARTS_V, DPK, DPV, BLOCK_TILES, BLOCK, slices, stride_dpt, stride_dph,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):
    """Sum the slices of one tile of prefix rows in a fixed order, one kv head."""
    t = tl.program_id(0)
    hk = tl.program_id(1)
    block = tl.load(BLOCK_TILES + 2 * t)
    n = tl.load(BLOCK_TILES + 2 * t + 1) + tl.arange(0, BN)
    start = tl.load(BLOCK + 2 * block)
    inside = n < tl.load(BLOCK + 2 * block + 1)
    tiles = tl.num_programs(0)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for part in range(0, slices):
        at = ((part * tiles + t) * BN + tl.arange(0, BN)) * H + hk
        dk += load_rows(PARTS_K, at, inside, D, D, DP, True, False)
        dv += load_rows(PARTS_V, at, inside, D, D, DP, True, False)
    store_rows(DPK + hk.to(tl.int64) * stride_dph, dk, start + n, inside, stride_dpt, D, DP)
    store_rows(DPV + hk.to(tl.int64) * stride_dph, dv, start + n, inside, stride_dpt, D, DP)
# fmt: on
