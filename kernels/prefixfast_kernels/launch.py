"""What every launch of a Triton kernel on packed rows needs: sizes, strides, options, by the kernels' parameter names.

Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tiles import Sizes, entry, interpreted, padded, rows_of
from prefixfast_kernels.torch_piece import Options


def dense(t: Tensor) -> Tensor:
    """The tensor itself if rows of its last dimension are contiguous, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """``stride_{name}t`` and ``stride_{name}h`` of tensors ``[rows, heads, D]``."""
    return {f"stride_{name}{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("th")}


def tables(t: PackedTables) -> dict[str, Tensor]:
    """The tables that every kernel reads."""
    return {"SEG": t.seg, "SEG_POS": t.seg_pos, "USE_INDPTR": t.use_indptr, "USE": t.use, "BLOCK": t.block}


def heads(q: Tensor, k: Tensor) -> dict[str, int]:
    """Head counts and dims."""
    return {"HQ": q.shape[1], "G": q.shape[1] // k.shape[1], "D": q.shape[2], "DP": padded(q.shape[2])}


def numbers(options: Options, *, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Run-time numbers and the flags made from them."""
    flags = {"CAUSAL": causal, "WINDOW": options.window > 0, "SOFTCAP": options.softcap > 0}
    # the interpreter multiplies bf16 bit patterns: upcast there; fp32 products are exact, not tf32
    compute = {"PRECISION": "ieee" if dtype == torch.float32 else "tf32", "UP": interpreted() and dtype == torch.bfloat16}
    return {"scale": options.scale, "softcap": options.softcap, "window": options.window, **flags, **compute}


def tile(kernel: str, q: Tensor, k: Tensor, sizes: Sizes, options: Options, *, fused: bool = False) -> dict[str, Any]:
    """Tile sizes and compile options of one kernel."""
    group = q.shape[1] // k.shape[1]
    how = entry(q.device, q.shape[2], q.dtype).how(kernel, group, masked=options.window > 0 or options.softcap > 0, fused=fused)
    over_queries = kernel in ("prefix_fwd", "prefix_bwd_dq")
    keys = {"prefix_bwd_kv": sizes.keys, "prefix_bwd_block": sizes.rows}.get(kernel, how.inner)
    tokens = sizes.tokens if over_queries else max(1, how.inner // group)
    return {"BM": rows_of(tokens, group), "BN": padded(keys), "TOKENS": tokens, **how.options()}


def slices(programs: int, users: int, tokens: int, device: torch.device) -> int:
    """Into how many slices the users of the blocks are cut, so that the device is full twice over (``programs`` programs a slice)."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    return max(1, min(-(-2 * processors // max(programs, 1)), 16, -(-users // max(tokens, 1))))
