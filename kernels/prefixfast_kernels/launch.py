"""Arguments of every launch of a Triton kernel on packed rows, by the kernels' parameter names.

Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, BM rows of a query tile, BH query heads
of a row's tile, BN keys of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnInputs, AttnOptions
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tile_configs import CHIP_INDEPENDENT
from prefixfast_kernels.tile_selection import (
    TileSizes,
    decode_config,
    is_interpreted,
    num_processors,
    packed_config,
    padded_size,
    tile_rows,
)


def last_dim_contiguous(t: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def prefix_pair(inputs: AttnInputs, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix keys and values in the dtype of the queries, or ``k`` and ``v`` without prefixes."""
    pk, pv = (
        last_dim_contiguous(own if t is None else t.to(inputs.q.dtype))
        for t, own in ((inputs.prefix_k, k), (inputs.prefix_v, v))
    )
    return pk, pv


def stride_args(**tensors: Tensor) -> dict[str, int]:
    """Arguments ``stride_{name}t`` and ``stride_{name}h`` of tensors ``[rows, heads, D]``."""
    return {f"stride_{name}{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("th")}


def table_args(t: PackedTables) -> dict[str, Tensor]:
    """Tables that the kernels over query tiles read."""
    return {"SEG": t.seg, "SEG_POS": t.seg_pos, "USE_INDPTR": t.use_indptr, "USE": t.use, "BLOCK": t.block}


def head_args(q: Tensor, k: Tensor) -> dict[str, int]:
    """Numbers of heads and head dims."""
    return {"HQ": q.shape[1], "G": q.shape[1] // k.shape[1], "D": q.shape[2], "DP": padded_size(q.shape[2])}


def option_args(options: AttnOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Options as numbers, and the flags that follow from them and from the dtype of the queries."""
    flags = {"CAUSAL": options.causal, "WINDOW": options.window > 0, "SOFTCAP": options.softcap > 0}
    # fp32 products are exact, not tf32. The interpreter would multiply the bit patterns of bf16, so it upcasts.
    compute = {
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "UP": is_interpreted() and dtype == torch.bfloat16,
    }
    return {"scale": options.scale, "softcap": options.softcap, "window": options.window, **flags, **compute}


def bias_args(bias: Tensor | None, unread: Tensor) -> dict[str, Any]:
    """Position bias ``[HQ, 2 * maxd + 1]`` in fp32, or the fp32 tensor ``unread``, and whether there is a bias."""
    if bias is None:
        return {"BIAS_TABLE": unread, "max_distance": 0, "BIAS": False}
    return {"BIAS_TABLE": bias.float().contiguous(), "max_distance": bias.shape[1] // 2, "BIAS": True}


def decode_option_args(options: AttnOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments as `option_args`, without causality: all keys of a row come before its query."""
    return {name: value for name, value in option_args(options, dtype).items() if name != "CAUSAL"}


def tile_args(
    kernel: str,
    q: Tensor,
    k: Tensor,
    sizes: TileSizes,
    options: AttnOptions,
    *,
    fused: bool = False,
    biased: bool = False,
) -> dict[str, Any]:
    """Tile sizes and compile options of one packed kernel."""
    group = q.shape[1] // k.shape[1]
    masked = options.window > 0 or options.softcap > 0
    configs = packed_config(q.device, q.shape[2], q.dtype)
    config = configs.compile_config(kernel, group, masked=masked, fused=fused, biased=biased)
    over_queries = kernel in ("prefix_fwd", "prefix_bwd_dq")
    keys = {"prefix_bwd_kv": sizes.keys, "prefix_bwd_block": sizes.rows}.get(kernel, config.inner)
    tokens = sizes.tokens if over_queries else max(1, config.inner // group)
    return {"BM": tile_rows(tokens, group), "BN": padded_size(keys), "TOKENS": tokens, **config.launch_options()}


def decode_tile_args(q: Tensor, k: Tensor, users: int) -> dict[str, Any]:
    """Tile sizes and compile options of `prefix_decode`.

    BM is the number of rows of a group's tile, BH that of a row's tile (its query heads of one kv head), BN the number
    of keys.
    """
    group = q.shape[1] // k.shape[1]
    config = decode_config(q.device, q.shape[2], q.dtype).config
    return {"BM": tile_rows(users, group), "BH": padded_size(group), "BN": config.inner, **config.launch_options()}


def combine_args(q: Tensor) -> dict[str, Any]:
    """Number of heads in a program of `decode_combine`, and its compile options."""
    config = CHIP_INDEPENDENT["decode_combine"]
    return {"BH": combine_heads(q.shape[1], q.shape[2]), **config.launch_options()}


def combine_heads(num_heads: int, head_dim: int) -> int:
    """Number of heads in a program of `decode_combine`, so that it has about 2,048 elements."""
    heads = max(1, CHIP_INDEPENDENT["decode_combine"].inner // padded_size(head_dim))
    return min(heads, 1 << (num_heads - 1).bit_length())


def num_slices(programs: int, users: int, tokens: int, device: torch.device) -> int:
    """Number of slices of the blocks' users, chosen so that the device is full twice over.

    Args:
        programs: Programs of one slice.
        users: (query row, block) pairs of all blocks.
        tokens: Query tokens of a tile.
        device: Device of the kernels.
    """
    processors = num_processors(device)
    return max(1, min(-(-2 * processors // max(programs, 1)), 16, -(-users // max(tokens, 1))))
