"""Decode attention in Triton: one query per row over its prefix blocks and its slots.

A shared prefix block is read once for a group of rows. The split softmax and the cost model of the grouping are
described in kernels/README.md. Specification: `reference.attn_decode`.
Shape letters: R rows, HQ query heads, H kv heads, G queries per kv head, D head dim, DP D padded to a power of two,
BM rows of a group's tile, BH query heads of a row's tile, BN keys of a tile, W work items, n partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixfast_kernels import launch
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.tile_ops import load_rows, online_softmax_update, store_output, store_rows

# Tables that `prefix_decode` reads, by their field of `DecodeTables`. The kernel's parameters have the same names.
TABLES = ("row", "lens", "use_indptr", "use", "block", "user", "user_pos", "user_slides", "work", "grouped")


# fmt: off
@triton.jit
def store_partial_sum(PART, STAT, acc, m, l, at, live, D: tl.constexpr, DP: tl.constexpr):
    """Store accumulator, maximum and sum of a partial softmax to rows ``at`` of ``[n * HQ, ...]``."""
    store_rows(PART, acc, at, live, D, D, DP)
    tl.store(STAT + 2 * at, m, mask=live)
    tl.store(STAT + 2 * at + 1, l, mask=live)


@triton.jit
def run_group_item(
    Q, K, V, PART, STAT, BLOCK, USER, USER_POS, USER_SLIDES, hk, block, first, count, lo, hi, part,
    BIAS_TABLE, scale, softcap, window, max_distance, stride_qt, stride_qh, stride_kt, stride_vt,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """Attention over rows ``lo`` to ``hi`` of a block for ``count`` of its users.

    Row r of the tile is user ``r // G``, head ``r % G``.
    """
    i = tl.arange(0, BM)
    n = tl.arange(0, BN)
    live = i // G < count
    row = tl.load(USER + first + i // G, mask=live, other=0)
    head = hk * G + i % G
    q = load_rows(Q + head[:, None].to(tl.int64) * stride_qh, row, live, stride_qt, D, DP, True, UP)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    start = tl.load(BLOCK + 2 * block)
    begin = lo
    pos = tl.load(USER_POS + first + i // G, mask=live, other=0)
    if WINDOW:  # the first visible row of the block differs between users
        slides = tl.load(USER_SLIDES + first + i // G, mask=live, other=0)
        from_row = tl.where(slides != 0, 1 - window - pos, 0)
        begin = tl.maximum(lo, tl.min(tl.where(live, from_row, hi), 0))
    for j in range(begin, hi, BN):
        here = j + n < hi
        seen = here[None, :]
        if WINDOW:
            seen = seen & ((j + n)[None, :] >= from_row[:, None])
        acc, m, l = online_softmax_update(
            acc, m, l, q, K, V, start + j + n, here, seen, stride_kt, stride_vt,
            scale, softcap, BIAS_TABLE, max_distance, head, -pos, j + n,
            D, DP, True, WINDOW, SOFTCAP, BIAS, PRECISION, UP)
    store_partial_sum(PART, STAT, acc, m, l, (part + i // G) * HQ + head, live, D, DP)


@triton.jit
def run_row_item(
    Q, K, V, PK, PV, O, LSE, PART, STAT, TABLE, ROW, LENS, USE_INDPTR, USE, BLOCK, GROUPED, hk, r, lo, hi, part,
    BIAS_TABLE, scale, softcap, window, max_distance, stride_table,
    stride_qt, stride_qh, stride_kt, stride_vt, stride_pkt, stride_pvt, stride_ot, stride_oh,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """Attention of one row over keys ``lo`` to ``hi`` of those that it reads by itself.

    These keys are its blocks that no group reads, from left to right, and then its slots.
    """
    i = tl.arange(0, BH)
    n = tl.arange(0, BN)
    live = i < G
    head = hk * G + i
    q = load_rows(Q + r.to(tl.int64) * stride_qt, head, live, stride_qh, D, DP, True, UP)
    m = tl.full([BH], -float("inf"), tl.float32)
    l = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, DP], tl.float32)
    own = tl.load(LENS + r)
    qpos = i * 0 + own - 1
    table = tl.where(live, head, 0)  # a head beyond the last one has no row in the bias
    base = lo * 0  # keys of the blocks before the current one
    for u in range(tl.load(USE_INDPTR + r), tl.load(USE_INDPTR + r + 1)):
        block = tl.load(USE + 3 * u)
        start = tl.load(BLOCK + 2 * block)
        length = tl.where(tl.load(GROUPED + block) != 0, 0, tl.load(BLOCK + 2 * block + 1))
        pos = tl.load(USE + 3 * u + 1)
        begin = tl.maximum(lo - base, 0)
        if WINDOW:
            slides = tl.load(USE + 3 * u + 2) != 0
            begin = tl.where(slides, tl.maximum(begin, own - window - pos), begin)
        end = tl.minimum(hi - base, length)
        for j in range(begin, end, BN):
            here = j + n < end
            acc, m, l = online_softmax_update(
                acc, m, l, q, PK, PV, start + j + n, here, here[None, :], stride_pkt, stride_pvt,
                scale, softcap, BIAS_TABLE, max_distance, table, qpos, pos + j + n,
                D, DP, True, False, SOFTCAP, BIAS, PRECISION, UP)
        base += length
    begin = tl.maximum(lo - base, 0)
    if WINDOW:
        begin = tl.maximum(begin, own - window)
    end = tl.minimum(hi - base, own)
    slots = TABLE + tl.load(ROW + r).to(tl.int64) * stride_table
    for j in range(begin, end, BN):
        here = j + n < end
        at = tl.load(slots + j + n, mask=here, other=0)
        acc, m, l = online_softmax_update(
            acc, m, l, q, K, V, at, here, here[None, :], stride_kt, stride_vt,
            scale, softcap, BIAS_TABLE, max_distance, table, qpos, j + n,
            D, DP, True, False, SOFTCAP, BIAS, PRECISION, UP)
    if part >= 0:
        store_partial_sum(PART, STAT, acc, m, l, part * HQ + head, live, D, DP)
    else:
        store_output(O, LSE, acc, m, l, r + i * 0, head, live, stride_ot, stride_oh, HQ, D, DP)


@triton.jit
def prefix_decode(
    Q, K, V, PK, PV, O, LSE, PART, STAT, TABLE, ROW, LENS, USE_INDPTR, USE, BLOCK, USER, USER_POS, USER_SLIDES,
    WORK, GROUPED, BIAS_TABLE, scale, softcap, window, max_distance, stride_table,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    stride_ot, stride_oh,
    HQ: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """Run one work item for one kv head. Programs of an item's kv heads follow each other, as their keys do."""
    w = WORK + 6 * (tl.program_id(0) // H)
    hk = tl.program_id(0) % H
    block = tl.load(w)
    first = tl.load(w + 1)
    count = tl.load(w + 2)
    lo = tl.load(w + 3)
    hi = tl.load(w + 4)
    part = tl.load(w + 5)
    k_head = hk.to(tl.int64) * stride_kh
    v_head = hk.to(tl.int64) * stride_vh
    pk_head = hk.to(tl.int64) * stride_pkh
    pv_head = hk.to(tl.int64) * stride_pvh
    if block >= 0:
        run_group_item(
            Q, PK + pk_head, PV + pv_head, PART, STAT, BLOCK, USER, USER_POS, USER_SLIDES, hk, block, first, count,
            lo, hi, part, BIAS_TABLE, scale, softcap, window, max_distance,
            stride_qt, stride_qh, stride_pkt, stride_pvt,
            HQ, G, D, DP, BM, BN, WINDOW, SOFTCAP, BIAS, PRECISION, UP)
    elif count > 0:
        run_row_item(
            Q, K + k_head, V + v_head, PK + pk_head, PV + pv_head, O, LSE, PART, STAT, TABLE, ROW, LENS, USE_INDPTR,
            USE, BLOCK, GROUPED, hk, first, lo, hi, part, BIAS_TABLE, scale, softcap, window, max_distance,
            stride_table, stride_qt, stride_qh, stride_kt, stride_vt, stride_pkt, stride_pvt, stride_ot, stride_oh,
            HQ, G, D, DP, BH, BN, WINDOW, SOFTCAP, BIAS, PRECISION, UP)


@triton.jit
def decode_combine(
    PART, STAT, O, LSE, PART_INDPTR, PARTS, stride_ot, stride_oh,
    HQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr,
):
    """Merge the partial sums of BH heads of a row in the order of the table.

    A row without partial sums is skipped, because `prefix_decode` has written its output.
    """
    r = tl.program_id(0)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    first = tl.load(PART_INDPTR + r)
    last = tl.load(PART_INDPTR + r + 1)
    live = head < tl.where(last > first, HQ, 0)
    m = tl.full([BH], -float("inf"), tl.float32)
    l = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, DP], tl.float32)
    for i in range(first, last):
        at = tl.load(PARTS + i) * HQ + head
        other = tl.load(STAT + 2 * at, mask=live, other=-float("inf"))
        new = tl.maximum(m, other)
        shift = tl.where(new == -float("inf"), 0.0, new)  # a part outside the window has seen no key
        decay = tl.exp2(m - shift)
        weight = tl.exp2(other - shift)
        l = l * decay + tl.load(STAT + 2 * at + 1, mask=live, other=0.0) * weight
        acc = acc * decay[:, None] + load_rows(PART, at, live, D, D, DP, True, False) * weight[:, None]
        m = new
    store_output(O, LSE, acc, m, l, r + head * 0, head, live, stride_ot, stride_oh, HQ, D, DP)
# fmt: on


def attn_decode(
    inputs: DecodeInputs,
    tables: DecodeTables,
    options: AttnOptions,
    users: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn_decode` in one launch, or in two if the tables name partial sums.

    No table is read on the host, so a captured graph serves other tables of the same shapes.

    Args:
        inputs: Queries ``[R, HQ, D]`` in fp32, bf16 or fp16, arena and prefix rows in any float dtype (cast to that of
            the queries tile by tile), and the slot table.
        tables: Tables whose ``work`` was made for groups of at most ``users`` rows.
        options: Scale, window, soft cap.
        users: Largest number of rows in a group's tile.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, without a soft cap, or None.

    Returns:
        Output ``[R, HQ, D]`` and the natural log-sum-exp ``[R, HQ]`` (fp32). A row without visible keys gives 0 and
        -inf.
    """
    q, k, v = map(launch.last_dim_contiguous, (inputs.q, inputs.k_arena, inputs.v_arena))
    pk, pv = (
        launch.last_dim_contiguous(arena if t is None else t)
        for t, arena in ((inputs.prefix_k, k), (inputs.prefix_v, v))
    )
    parts, heads = len(tables.part), launch.head_args(q, k)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, stat, part = (
        torch.empty(s, dtype=torch.float32, device=q.device)
        for s in (q.shape[:2], (parts, q.shape[1], 2), (parts, *q.shape[1:]))
    )
    out = {"O": o, "LSE": lse, "PART": part, "STAT": stat}
    prefix_decode[len(tables.work) * k.shape[1],](
        Q=q,
        K=k,
        V=v,
        PK=pk,
        PV=pv,
        **out,
        TABLE=inputs.slot_table,
        stride_table=inputs.slot_table.stride(0),
        **{name.upper(): getattr(tables, name) for name in TABLES},
        **launch.stride_args(q=q, k=k, v=v, pk=pk, pv=pv, o=o),
        **heads,
        H=k.shape[1],
        **launch.decode_option_args(options, q.dtype),
        **launch.bias_args(bias, lse),
        **launch.decode_tile_args(q, k, users),
    )
    if parts:
        combine = launch.combine_args(q)
        grid = (q.shape[0], -(-q.shape[1] // combine["BH"]))
        decode_combine[grid](
            **out,
            PART_INDPTR=tables.part_indptr,
            PARTS=tables.part,
            stride_ot=o.stride(0),
            stride_oh=o.stride(1),
            **{n: heads[n] for n in ("HQ", "D", "DP")},
            **combine,
        )
    return o, lse
