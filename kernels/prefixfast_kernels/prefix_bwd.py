"""Backward of packed attention over [prefix blocks; keys] in Triton.

Every kernel recomputes the probabilities from the merged log-sum-exp, so the gradients of each part are exact and add
up (kernels/README.md). There are no atomics, so equal inputs give equal bits, and no gradient of the prefix is made per
sequence. The kernels run in this order:

* `prefix_bwd_delta` computes the row sums of output times gradient.
* `prefix_bwd_block` computes dK and dV of the blocks. Each slice of a block's users goes to an fp32 partial sum of its
  own. If every query sees at most one tile of prefix rows, this kernel also computes that part of dQ (fused).
* `prefix_bwd_sum` adds the slices in a fixed order.
* `prefix_bwd_dq` runs over query tiles, `prefix_bwd_kv` over key tiles.

Specification: autograd through `reference.attn`.
Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows, NS slices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from prefixfast_kernels import launch
from prefixfast_kernels.inputs import AttnGrads, AttnInputs, AttnOptions, NeedsGrad, OutputGrad
from prefixfast_kernels.prefix_bwd_dq import prefix_bwd_delta, prefix_bwd_dq
from prefixfast_kernels.prefix_bwd_kv import prefix_bwd_block, prefix_bwd_kv, prefix_bwd_sum
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tile_configs import CHIP_INDEPENDENT
from prefixfast_kernels.tile_selection import TileSizes


class _Work(NamedTuple):
    """Tensors, tables and options that the kernels of one backward share.

    Attributes:
        tensors: q, k, v, pk, pv and do by these names, last dimension contiguous, in the dtype of the queries.
        tables: Tables of the forward.
        options: Options of the forward.
        sizes: Tile sizes that the tables were cut into.
        shared: Arguments of every kernel but `prefix_bwd_delta` and `prefix_bwd_sum`.
        part: Prefix part of dQ ``[N, HQ, D]``, fp32, if fused, else one element.
        fused: Whether `prefix_bwd_block` computes the prefix part of dQ.
    """

    tensors: dict[str, Tensor]
    tables: PackedTables
    options: AttnOptions
    sizes: TileSizes
    shared: dict[str, Any]
    part: Tensor
    fused: bool

    def stride_args(self, *names: str, **others: Tensor) -> dict[str, int]:
        """Strides of the named tensors and of ``others``."""
        return launch.stride_args(**{name: self.tensors[name] for name in names}, **others)

    def tile_args(self, kernel: str, *, fused: bool = False) -> dict[str, Any]:
        """Tile sizes and compile options of a kernel."""
        q, k, biased = self.tensors["q"], self.tensors["k"], bool(self.shared["BIAS"])
        return launch.tile_args(kernel, q, k, self.sizes, self.options, fused=fused, biased=biased)


def attn_bwd(
    grad: OutputGrad,
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    sizes: TileSizes,
    needs: NeedsGrad,
    bias: Tensor | None = None,
) -> AttnGrads:
    """Gradients of `prefix_fwd.attn_fwd`. Equal inputs give equal bits.

    Args:
        grad: Gradient of the output, the output and the log-sum-exp of the forward.
        inputs: Inputs of the forward.
        tables: Tables whose ``tiles``, ``key_tiles`` and ``block_tiles`` were made for ``sizes``.
        options: Options of the forward.
        sizes: Tile sizes that the tables were cut into.
        needs: Gradients to compute.
        bias: Position bias of the forward ``[HQ, 2 * maxd + 1]``, or None. It has no gradient.

    Returns:
        Gradients, None where not needed. A block's gradient is the sum over all its users, in the dtype of
        ``prefix_k``.
    """
    work = _prepare(grad, inputs, tables, options, sizes, needs, bias)
    prefix_k, prefix_v = inputs.prefix_k, inputs.prefix_v
    dpk = dpv = dq = dk = dv = None
    if needs.prefix and prefix_k is not None and prefix_v is not None:
        dpk, dpv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (prefix_k, prefix_v))
        if len(tables.use) > 0:
            _block_gradients(work, dpk, dpv)
    if needs.own:
        dq, dk, dv = _own_gradients(work, inputs.slots, has_prefix=prefix_k is not None and len(tables.use) > 0)
    return AttnGrads(dq, dk, dv, dpk, dpv)


def _prepare(
    grad: OutputGrad,
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    sizes: TileSizes,
    needs: NeedsGrad,
    bias: Tensor | None,
) -> _Work:
    """Run `prefix_bwd_delta` and collect what the other kernels share."""
    o, lse = grad.o, grad.lse
    q, k, v, do = map(launch.last_dim_contiguous, (*inputs[:3], grad.do))
    pk, pv = launch.prefix_pair(inputs, k, v)
    delta = torch.empty_like(lse)
    heads = launch.head_args(q, k)
    config = CHIP_INDEPENDENT["prefix_bwd_delta"]
    rows = max(1, config.inner // heads["DP"])
    prefix_bwd_delta[(triton.cdiv(lse.numel(), rows),)](
        o,
        do,
        delta,
        lse.numel(),
        **launch.stride_args(o=o, do=do),
        **{name: heads[name] for name in ("HQ", "D", "DP")},
        BM=rows,
        **config.launch_options(),
    )
    shared = {"Q": q, "DO": do, "LSE": lse, "DELTA": delta, **heads}
    shared |= launch.option_args(options, q.dtype) | launch.bias_args(bias, lse)
    has_prefix = inputs.prefix_k is not None and len(tables.use) > 0
    one_tile = sizes.depth <= 1 and len(tables.block_tiles) == len(tables.block)  # of prefix rows for every query
    # Other fused kernels spill.
    fits = q.shape[2] <= 128 and not options.window and not options.softcap and bias is None
    fused = one_tile and fits and has_prefix and needs.own and needs.prefix
    part = torch.empty(q.shape if fused else 1, dtype=torch.float32, device=q.device)
    tensors = {"q": q, "k": k, "v": v, "pk": pk, "pv": pv, "do": do}
    return _Work(tensors, tables, options, sizes, shared, part, fused)


def _own_gradients(work: _Work, slots: Tensor | None, *, has_prefix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    q, k, v, pk, pv, _ = work.tensors.values()
    tables = work.tables
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Rows that no segment names keep their zeros.
    dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    arena = {"SLOTS": tables.seg if slots is None else slots, "ARENA": slots is not None}
    prefix_bwd_dq[len(tables.tiles), k.shape[1]](
        K=k,
        V=v,
        PK=pk,
        PV=pv,
        DQ=dq,
        PART=work.part,
        TILES=tables.tiles,
        PREFIX=has_prefix,
        FUSED=work.fused,
        **arena,
        **work.shared,
        **launch.table_args(tables),
        **work.stride_args("q", "k", "v", "pk", "pv", "do", dq=dq),
        **work.tile_args("prefix_bwd_dq", fused=work.fused),
    )
    prefix_bwd_kv[len(tables.key_tiles), k.shape[1]](
        K=k,
        V=v,
        DK=dk,
        DV=dv,
        KEY_TILES=tables.key_tiles,
        SEG=tables.seg,
        SEG_POS=tables.seg_pos,
        **arena,
        **work.shared,
        **work.stride_args("q", "k", "v", "do", dk=dk),
        **work.tile_args("prefix_bwd_kv"),
    )
    return dq, dk, dv


def _block_gradients(work: _Work, dpk: Tensor, dpv: Tensor) -> None:
    """Write the gradients of the prefix blocks to ``dpk`` and ``dpv``, and the prefix part of dQ if fused."""
    q, k, _, pk, pv, _ = work.tensors.values()
    tables = work.tables
    tiles, num_kv_heads = len(tables.block_tiles), k.shape[1]
    tile = work.tile_args("prefix_bwd_block", fused=work.fused)
    slices = launch.num_slices(tiles * num_kv_heads, len(tables.user), int(tile["TOKENS"]), q.device)
    shape = (slices, tiles, tile["BN"], num_kv_heads, q.shape[2])
    parts_k, parts_v = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in "kv")
    prefix_bwd_block[tiles, num_kv_heads, slices](
        PK=pk,
        PV=pv,
        PARTS_K=parts_k,
        PARTS_V=parts_v,
        PART=work.part,
        BLOCK_TILES=tables.block_tiles,
        BLOCK=tables.block,
        USER_INDPTR=tables.user_indptr,
        USER=tables.user,
        USER_POS=tables.user_pos,
        USER_SLIDES=tables.user_slides,
        H=num_kv_heads,
        FUSED=work.fused,
        **{name: value for name, value in work.shared.items() if name != "CAUSAL"},
        **tile,
        **work.stride_args("q", "pk", "pv", "do"),
    )
    prefix_bwd_sum[tiles, num_kv_heads](
        parts_k,
        parts_v,
        dpk,
        dpv,
        tables.block_tiles,
        tables.block,
        slices,
        **launch.stride_args(dp=dpk),
        H=num_kv_heads,
        D=q.shape[2],
        DP=work.shared["DP"],
        BN=tile["BN"],
        **CHIP_INDEPENDENT["prefix_bwd_sum"].launch_options(),
    )
