"""What every launch of a Triton kernel on packed rows needs: sizes, strides, options, by the kernels' parameter names.

Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tile_configs import EVERYWHERE, Sizes, decode_entry, entry, interpreted, padded, rows_of
from prefixfast_kernels.torch_sdpa_lse import Options


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
    compute = {
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "UP": interpreted() and dtype == torch.bfloat16,
    }
    return {"scale": options.scale, "softcap": options.softcap, "window": options.window, **flags, **compute}


def tile(kernel: str, q: Tensor, k: Tensor, sizes: Sizes, options: Options, *, fused: bool = False) -> dict[str, Any]:
    """Tile sizes and compile options of one kernel."""
    group = q.shape[1] // k.shape[1]
    how = entry(q.device, q.shape[2], q.dtype).how(
        kernel, group, masked=options.window > 0 or options.softcap > 0, fused=fused
    )
    over_queries = kernel in ("prefix_fwd", "prefix_bwd_dq")
    keys = {"prefix_bwd_kv": sizes.keys, "prefix_bwd_block": sizes.rows}.get(kernel, how.inner)
    tokens = sizes.tokens if over_queries else max(1, how.inner // group)
    return {"BM": rows_of(tokens, group), "BN": padded(keys), "TOKENS": tokens, **how.options()}


def decode_numbers(options: Options, dtype: torch.dtype) -> dict[str, Any]:
    """As `numbers`, without causality: a row's keys all come before its query."""
    return {name: value for name, value in numbers(options, causal=True, dtype=dtype).items() if name != "CAUSAL"}


def decode_tile(q: Tensor, k: Tensor, users: int, options: Options) -> dict[str, Any]:
    """Tile sizes and compile options of `prefix_decode`: BM rows of a group's tile, BH of a row's (its query heads of one kv head), BN keys."""
    group = q.shape[1] // k.shape[1]
    found = decode_entry(q.device, q.shape[2], q.dtype)
    how = found.how(group, masked=options.window > 0 or options.softcap > 0)
    return {"BM": rows_of(users, group), "BH": padded(group), "BN": how.inner, **how.options()}


def combine_tile(q: Tensor) -> dict[str, Any]:
    """Heads of a program of `decode_combine` and its compile options."""
    how = EVERYWHERE["decode_combine"]
    return {"BH": combine_heads(q.shape[1], q.shape[2]), **how.options()}


def combine_heads(num_heads: int, head_dim: int) -> int:
    """Heads of one program of `decode_combine`: as many as give it about 2,048 numbers."""
    return min(max(1, EVERYWHERE["decode_combine"].inner // padded(head_dim)), 1 << (num_heads - 1).bit_length())


def slices(programs: int, users: int, tokens: int, device: torch.device) -> int:
    """Into how many slices the users of the blocks are cut, so that the device is full twice over (``programs`` programs a slice)."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    return max(1, min(-(-2 * processors // max(programs, 1)), 16, -(-users // max(tokens, 1))))
