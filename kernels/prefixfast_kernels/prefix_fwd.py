"""Forward of packed attention over [prefix blocks; keys] in one Triton kernel.

The prefix is not expanded, and there is no second pass and no merge. The mathematics and the tile sizes are described
in kernels/README.md. Specification: `reference.attn`.
Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixfast_kernels import launch
from prefixfast_kernels.inputs import AttnInputs, AttnOptions
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tile_ops import (
    key_range,
    key_rows,
    load_query_tile,
    load_rows,
    online_softmax_update,
    store_output,
    visible_keys,
)
from prefixfast_kernels.tile_selection import TileSizes


# fmt: off
@triton.jit
def prefix_fwd(
    Q, K, V, PK, PV, O, LSE, TILES, SEG, SEG_POS, USE_INDPTR, USE, BLOCK, SLOTS, BIAS_TABLE,
    scale, softcap, window, max_distance,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    stride_ot, stride_oh,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TOKENS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    PREFIX: tl.constexpr, ARENA: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """Output of one tile of at most TOKENS query tokens, one kv head."""
    t = tl.program_id(0)
    hk = tl.program_id(1)
    s, key0, keys, tokens, pos, live, qrow, head, qpos = load_query_tile(TILES, SEG, SEG_POS, t, hk, G, BM, TOKENS)
    n = tl.arange(0, BN)
    q = load_rows(Q + head[:, None].to(tl.int64) * stride_qh, qrow, live, stride_qt, D, DP, True, UP)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)

    if PREFIX:
        PKh = PK + hk.to(tl.int64) * stride_pkh
        PVh = PV + hk.to(tl.int64) * stride_pvh
        for u in range(tl.load(USE_INDPTR + s), tl.load(USE_INDPTR + s + 1)):
            block = tl.load(USE + 3 * u)
            start = tl.load(BLOCK + 2 * block)
            length = tl.load(BLOCK + 2 * block + 1)
            lo = 0
            full = length // BN * BN
            at = tl.load(USE + 3 * u + 1)
            if WINDOW:  # every tile is masked, from the first row that the first query may see
                slides = tl.load(USE + 3 * u + 2)
                full = tl.where(slides != 0, tl.maximum(pos - window + 1 - at, 0) // BN * BN, 0)
                for j in range(full, length, BN):
                    in_window = (slides == 0) | ((at + j + n)[None, :] > (qpos - window)[:, None])
                    seen = ((j + n) < length)[None, :] & in_window
                    acc, m, l = online_softmax_update(
                        acc, m, l, q, PKh, PVh, start + j + n, j + n < length, seen, stride_pkt, stride_pvt,
                        scale, softcap, BIAS_TABLE, max_distance, head, qpos, at + j + n,
                        D, DP, True, True, SOFTCAP, BIAS, PRECISION, UP)
            else:
                for j in range(lo, full, BN):
                    acc, m, l = online_softmax_update(
                        acc, m, l, q, PKh, PVh, start + j + n, live, live, stride_pkt, stride_pvt,
                        scale, softcap, BIAS_TABLE, max_distance, head, qpos, at + j + n,
                        D, DP, False, False, SOFTCAP, BIAS, PRECISION, UP)
                for j in range(full, length, BN):
                    seen = tl.broadcast_to(((j + n) < length)[None, :], (BM, BN))
                    acc, m, l = online_softmax_update(
                        acc, m, l, q, PKh, PVh, start + j + n, j + n < length, seen, stride_pkt, stride_pvt,
                        scale, softcap, BIAS_TABLE, max_distance, head, qpos, at + j + n,
                        D, DP, True, True, SOFTCAP, BIAS, PRECISION, UP)

    Kh = K + hk.to(tl.int64) * stride_kh
    Vh = V + hk.to(tl.int64) * stride_vh
    lo, full, hi = key_range(pos, tokens, keys, window, BN, CAUSAL, WINDOW)
    for j in range(lo, full, BN):
        at = key_rows(SLOTS, key0, j + n, hi, ARENA, False)
        acc, m, l = online_softmax_update(
            acc, m, l, q, Kh, Vh, at, live, live, stride_kt, stride_vt,
            scale, softcap, BIAS_TABLE, max_distance, head, qpos, j + n,
            D, DP, False, False, SOFTCAP, BIAS, PRECISION, UP)
    for j in range(full, hi, BN):
        at = key_rows(SLOTS, key0, j + n, hi, ARENA, True)
        seen = visible_keys(j + n, hi, qpos, window, BM, BN, CAUSAL, WINDOW)
        acc, m, l = online_softmax_update(
            acc, m, l, q, Kh, Vh, at, j + n < hi, seen, stride_kt, stride_vt,
            scale, softcap, BIAS_TABLE, max_distance, head, qpos, j + n,
            D, DP, True, True, SOFTCAP, BIAS, PRECISION, UP)

    store_output(O, LSE, acc, m, l, qrow, head, live, stride_ot, stride_oh, HQ, D, DP)
# fmt: on


def attn_fwd(
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    sizes: TileSizes,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn` in one launch.

    Args:
        inputs: Queries ``[N, HQ, D]`` in fp32, bf16 or fp16, keys and values in the same dtype, and prefix rows in any
            float dtype, which are cast to that of the queries.
        tables: Tables whose ``tiles`` were made for ``sizes``.
        options: Scale, window, soft cap, causality.
        sizes: Tile sizes that the tables were cut into.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, without a soft cap, or None.

    Returns:
        Output ``[N, HQ, D]`` and the natural log-sum-exp ``[N, HQ]`` (fp32). Query rows that belong to no tile are not
        written.
    """
    slots = inputs.slots
    q, k, v = map(launch.last_dim_contiguous, inputs[:3])
    pk, pv = launch.prefix_pair(inputs, k, v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    prefix_fwd[len(tables.tiles), k.shape[1]](
        Q=q,
        K=k,
        V=v,
        PK=pk,
        PV=pv,
        O=o,
        LSE=lse,
        TILES=tables.tiles,
        SLOTS=tables.seg if slots is None else slots,
        **launch.table_args(tables),
        **launch.stride_args(q=q, k=k, v=v, pk=pk, pv=pv, o=o),
        **launch.head_args(q, k),
        **launch.option_args(options, q.dtype),
        **launch.bias_args(bias, lse),
        **launch.tile_args("prefix_fwd", q, k, sizes, options, biased=bias is not None),
        PREFIX=len(tables.use) > 0,
        ARENA=slots is not None,
    )
    return o, lse
