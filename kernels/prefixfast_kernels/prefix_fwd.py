"""Forward of packed attention over [prefix blocks; keys] in one Triton kernel: no expansion of the prefix, no second pass, no merge.

Specification: `reference.attn`; the maths and the tile sizes: kernels/README.md. Shape letters: N packed queries, M keys,
HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixfast_kernels import launch
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tile_configs import Sizes
from prefixfast_kernels.tile_ops import fold, key_range, key_rows, keys_seen, load_rows, query_tile, store_out
from prefixfast_kernels.torch_sdpa_lse import Options


# fmt: off
@triton.jit
def prefix_fwd(
    Q, K, V, PK, PV, O, LSE, TILES, SEG, SEG_POS, USE_INDPTR, USE, BLOCK, SLOTS,
    scale, softcap, window,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_pkt, stride_pkh, stride_pvt, stride_pvh, stride_ot, stride_oh,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, ARENA: tl.constexpr,
    PRECISION: tl.constexpr, UP: tl.constexpr,
):
    """One tile of at most TOKENS query tokens, one kv head."""
    t = tl.program_id(0)
    hk = tl.program_id(1)
    s, key0, keys, tokens, pos, live, qrow, head, qpos = query_tile(TILES, SEG, SEG_POS, t, hk, G, BM, TOKENS)
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
            if WINDOW:  # all masked, from the first row that the first query may see
                at = tl.load(USE + 3 * u + 1)
                slides = tl.load(USE + 3 * u + 2)
                full = tl.where(slides != 0, tl.maximum(pos - window + 1 - at, 0) // BN * BN, 0)
                for j in range(full, length, BN):
                    seen = ((j + n) < length)[None, :] & ((slides == 0) | ((at + j + n)[None, :] > (qpos - window)[:, None]))
                    acc, m, l = fold(acc, m, l, q, PKh, PVh, start + j + n, j + n < length, seen, stride_pkt, stride_pvt, scale, softcap, D, DP,
                        True, True, SOFTCAP, PRECISION, UP)
            else:
                for j in range(lo, full, BN):
                    acc, m, l = fold(acc, m, l, q, PKh, PVh, start + j + n, live, live, stride_pkt, stride_pvt, scale, softcap, D, DP, False,
                        False, SOFTCAP, PRECISION, UP)
                for j in range(full, length, BN):
                    seen = tl.broadcast_to(((j + n) < length)[None, :], (BM, BN))
                    acc, m, l = fold(acc, m, l, q, PKh, PVh, start + j + n, j + n < length, seen, stride_pkt, stride_pvt, scale, softcap, D, DP,
                        True, True, SOFTCAP, PRECISION, UP)

    Kh = K + hk.to(tl.int64) * stride_kh
    Vh = V + hk.to(tl.int64) * stride_vh
    lo, full, hi = key_range(pos, tokens, keys, window, BN, CAUSAL, WINDOW)
    for j in range(lo, full, BN):
        at = key_rows(SLOTS, key0, j + n, hi, ARENA, False)
        acc, m, l = fold(acc, m, l, q, Kh, Vh, at, live, live, stride_kt, stride_vt, scale, softcap, D, DP, False, False, SOFTCAP, PRECISION, UP)
    for j in range(full, hi, BN):
        at = key_rows(SLOTS, key0, j + n, hi, ARENA, True)
        seen = keys_seen(j + n, hi, qpos, window, BM, BN, CAUSAL, WINDOW)
        acc, m, l = fold(acc, m, l, q, Kh, Vh, at, j + n < hi, seen, stride_kt, stride_vt, scale, softcap, D, DP, True,
            True, SOFTCAP, PRECISION, UP)

    store_out(O, LSE, acc, m, l, qrow, head, live, stride_ot, stride_oh, HQ, D, DP)
# fmt: on


def attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    tables: PackedTables,
    options: Options,
    sizes: Sizes,
    *,
    causal: bool = True,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn` in one launch.

    Args:
        q: ``[N, HQ, D]``, fp32, bf16 or fp16.
        k: ``[M, H, D]``.
        v: As ``k``.
        prefix_k: ``[sum P, H, D]`` in any float dtype (cast to that of ``q``), or None.
        prefix_v: As ``prefix_k``.
        tables: See `PackedTables`; ``tiles`` made for ``sizes``.
        options: Scale, window, soft cap.
        sizes: What the tables were cut into.
        causal: Hide keys after the query.
        slots: If given, key j of a segment is row ``slots[first key + j]`` of ``k``.

    Returns:
        ``[N, HQ, D]`` and the natural log-sum-exp ``[N, HQ]`` (fp32). Rows of no tile are not written.
    """
    q, k, v = map(launch.dense, (q, k, v))
    pk, pv = (launch.dense(own if t is None else t.to(q.dtype)) for t, own in ((prefix_k, k), (prefix_v, v)))
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
        **launch.tables(tables),
        **launch.strides(q=q, k=k, v=v, pk=pk, pv=pv, o=o),
        **launch.heads(q, k),
        **launch.numbers(options, causal=causal, dtype=q.dtype),
        **launch.tile("prefix_fwd", q, k, sizes, options),
        PREFIX=len(tables.use) > 0,
        ARENA=slots is not None,
    )
    return o, lse
