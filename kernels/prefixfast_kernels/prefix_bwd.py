"""Backward of packed attention over [prefix blocks; keys] in Triton: deterministic, without atomics, no gradient of the prefix per sequence.

Every kernel recomputes the probabilities from the merged log-sum-exp, so each part's gradients are exact and simply add (kernels/README.md). `prefix_bwd_delta`
first; then `prefix_bwd_block` (dK, dV of the blocks, each slice of a block's users into its own fp32 partial, summed in fixed order by `prefix_bwd_sum`;
where every query sees at most one tile of prefix rows also dQ of that part), `prefix_bwd_dq` over query tiles, `prefix_bwd_kv` over key tiles.
Specification: autograd through `reference.attn`. Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows, NS slices.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from prefixfast_kernels import launch
from prefixfast_kernels.prefix_bwd_dq import prefix_bwd_delta, prefix_bwd_dq
from prefixfast_kernels.prefix_bwd_kv import prefix_bwd_block, prefix_bwd_kv, prefix_bwd_sum
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tile_configs import EVERYWHERE, Sizes
from prefixfast_kernels.torch_sdpa_lse import Options


def attn_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    tables: PackedTables,
    options: Options,
    sizes: Sizes,
    *,
    causal: bool = True,
    slots: Tensor | None = None,
    needs_own: bool = True,
    needs_prefix: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `prefix_fwd.attn_fwd`; equal inputs give equal bits.

    Args:
        do: Gradient of ``o`` ``[N, HQ, D]``.
        q: As in the forward; so are all but the following.
        k: See ``q``.
        v: See ``q``.
        prefix_k: See ``q``.
        prefix_v: See ``q``.
        o: Output of the forward.
        lse: Log-sum-exp of the forward.
        tables: See `PackedTables`; ``tiles``, ``key_tiles`` and ``block_tiles`` made for ``sizes``.
        options: See ``q``.
        sizes: See ``q``.
        causal: See ``q``.
        slots: See ``q``.
        needs_own: Whether q, k or v needs a gradient (layer 0 above a frozen embedding does not).
        needs_prefix: Whether the prefix needs one.

    Returns:
        dq, dk, dv, dprefix_k, dprefix_v (None where not needed); a block's gradient is the sum over all its users, in the dtype of ``prefix_k``.
    """
    q, k, v, do = map(launch.dense, (q, k, v, do))
    pk, pv = (launch.dense(own if t is None else t.to(q.dtype)) for t, own in ((prefix_k, k), (prefix_v, v)))
    delta = torch.empty_like(lse)
    heads = launch.heads(q, k)
    wide = {key: heads[key] for key in ("HQ", "D", "DP")}
    how = EVERYWHERE["prefix_bwd_delta"]
    rows = max(1, how.inner // heads["DP"])
    prefix_bwd_delta[(triton.cdiv(lse.numel(), rows),)](
        o, do, delta, lse.numel(), **launch.strides(o=o, do=do), **wide, BM=rows, **how.options()
    )
    common = {
        "Q": q,
        "DO": do,
        "LSE": lse,
        "DELTA": delta,
        **launch.numbers(options, causal=causal, dtype=q.dtype),
        **heads,
    }
    has_prefix = prefix_k is not None and len(tables.use) > 0
    short = sizes.depth <= 1 and len(tables.block_tiles) == len(
        tables.block
    )  # every query sees at most one tile of prefix rows
    fits = q.shape[2] <= 128 and not options.window and not options.softcap  # else the fused kernels spill
    fused = short and fits and has_prefix and needs_own and needs_prefix
    part = torch.empty(q.shape if fused else 1, dtype=torch.float32, device=q.device)
    dpk = dpv = dq = dk = dv = None
    if needs_prefix and prefix_k is not None and prefix_v is not None:
        dpk, dpv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (prefix_k, prefix_v))
        if has_prefix:
            _block_gradients(dpk, dpv, part, q, k, pk, pv, do, tables, options, sizes, common, fused=fused)
    if needs_own:
        dq, dk, dv = _own_gradients(
            q, k, v, pk, pv, do, part, tables, options, sizes, slots, common, has_prefix=has_prefix, fused=fused
        )
    return dq, dk, dv, dpk, dpv


def _own_gradients(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, do: Tensor, part: Tensor, tables: PackedTables, options: Options, sizes: Sizes,
    slots: Tensor | None, common: dict[str, object], *, has_prefix: bool, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (k, v)
    )  # rows that no segment names keep their zeros
    arena = {"SLOTS": tables.seg if slots is None else slots, "ARENA": slots is not None}
    prefix_bwd_dq[len(tables.tiles), k.shape[1]](
        K=k, V=v, PK=pk, PV=pv, DQ=dq, PART=part, TILES=tables.tiles, PREFIX=has_prefix, FUSED=fused, **arena, **common,
        **launch.tables(tables), **launch.strides(q=q, k=k, v=v, pk=pk, pv=pv, do=do, dq=dq), **launch.tile("prefix_bwd_dq", q, k, sizes, options, fused=fused),
    )  # fmt: skip
    prefix_bwd_kv[len(tables.key_tiles), k.shape[1]](
        K=k, V=v, DK=dk, DV=dv, KEY_TILES=tables.key_tiles, SEG=tables.seg, SEG_POS=tables.seg_pos, **arena, **common,
        **launch.strides(q=q, k=k, v=v, do=do, dk=dk), **launch.tile("prefix_bwd_kv", q, k, sizes, options),
    )  # fmt: skip
    return dq, dk, dv


def _block_gradients(
    dpk: Tensor, dpv: Tensor, part: Tensor, q: Tensor, k: Tensor, pk: Tensor, pv: Tensor, do: Tensor, tables: PackedTables, options: Options,
    sizes: Sizes, common: dict[str, object], *, fused: bool,
) -> None:  # fmt: skip
    tiles, h, how = (
        len(tables.block_tiles),
        k.shape[1],
        launch.tile("prefix_bwd_block", q, k, sizes, options, fused=fused),
    )
    slices = launch.slices(tiles * h, len(tables.user), int(how["TOKENS"]), q.device)
    shape = (slices, tiles, how["BN"], h, q.shape[2])
    parts_k, parts_v = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in "kv")
    given = {key: value for key, value in common.items() if key != "CAUSAL"}
    prefix_bwd_block[tiles, h, slices](
        PK=pk,
        PV=pv,
        PARTS_K=parts_k,
        PARTS_V=parts_v,
        PART=part,
        BLOCK_TILES=tables.block_tiles,
        BLOCK=tables.block,
        USER_INDPTR=tables.user_indptr,
        USER=tables.user,
        USER_POS=tables.user_pos,
        USER_SLIDES=tables.user_slides,
        H=h,
        FUSED=fused,
        **given,
        **how,
        **launch.strides(q=q, pk=pk, pv=pv, do=do),
    )
    prefix_bwd_sum[tiles, h](
        parts_k,
        parts_v,
        dpk,
        dpv,
        tables.block_tiles,
        tables.block,
        slices,
        **launch.strides(dp=dpk),
        H=h,
        D=q.shape[2],
        DP=common["DP"],
        BN=how["BN"],
        **EVERYWHERE["prefix_bwd_sum"].options(),
    )
