"""Reasons why a backend does not support a call, for each operator.

A call that a backend does not support runs on the next backend, and the reason is logged once. A backend that was asked
for by the name ``triton`` raises instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prefixfast.attention import cpu_decode, cpu_dense
from prefixfast.attention.backends import DESCRIPTIONS, Unsupported, describe_choice
from prefixfast_kernels.inputs import AttnInputs, AttnOptions, DecodeInputs
from prefixfast_kernels.tile_configs import MAX_BIASED_HEAD_DIM
from prefixfast_kernels.tile_selection import Backend, TileSizes

BIAS_WITH_CAP = "a position bias with a soft cap"
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _holding(reasons: Mapping[str, bool]) -> list[str]:
    return [reason for reason, holds in reasons.items() if holds]


def _bias_unsupported_by_triton(q: Tensor, k: Tensor, options: AttnOptions) -> dict[str, bool]:
    """Reasons why the Triton kernels do not take a position bias: no model needs it, and it is not compiled."""
    head_dim = q.shape[2]
    return {
        BIAS_WITH_CAP: options.softcap > 0,
        "a position bias with a sliding window": options.window > 0,
        "a position bias with grouped query heads": q.shape[1] != k.shape[1],
        f"a position bias at head dim {head_dim}": head_dim & (head_dim - 1) > 0 or head_dim > MAX_BIASED_HEAD_DIM,
    }


def packed_unsupported(
    inputs: AttnInputs,
    options: AttnOptions,
    sizes: TileSizes,
    *,
    has_bias: bool = False,
    square: bool = True,
    backward: bool = False,
) -> Unsupported:
    """Reasons why a call of `attn`, or of its backward, is unsupported, by backend.

    Args:
        inputs: Queries, keys, values and prefix rows of the call.
        options: Scale, window, soft cap, causality.
        sizes: Tile sizes that the tables were cut into.
        has_bias: Whether there is a position bias.
        square: Whether the queries of every segment are its last keys.
        backward: Whether the call is a backward.
    """
    q, k, v = inputs[:3]
    in_slots = inputs.slots is not None
    torch_reasons = {
        "gradients of keys in the slot table": backward and in_slots,
        "non-causal attention over keys in the slot table": not options.causal and in_slots,
        "causal segments whose queries are not their last keys": options.causal and not square,
        BIAS_WITH_CAP: has_bias and options.softcap > 0,
    }
    triton_reasons = {
        **(_bias_unsupported_by_triton(q, k, options) if has_bias else {}),
        f"{q.dtype}": q.dtype not in TRITON_DTYPES,
        "keys of another dtype than the queries": not q.dtype == k.dtype == v.dtype,
        "tables without tiles": not sizes.tokens,
    }
    return {"triton": _holding(triton_reasons), "torch": _holding(torch_reasons)}


def decode_unsupported(
    inputs: DecodeInputs, options: AttnOptions, *, has_work: bool, has_bias: bool = False
) -> Unsupported:
    """Reasons why a call of `attn_decode` is unsupported, by backend.

    Args:
        inputs: Queries, arena and prefix rows of the call.
        options: Scale, window, soft cap.
        has_work: Whether the tables have the work of the Triton kernel.
        has_bias: Whether there is a position bias.
    """
    q = inputs.q
    torch_reasons = {BIAS_WITH_CAP: has_bias and options.softcap > 0}
    triton_reasons = {
        **(_bias_unsupported_by_triton(q, inputs.k_arena, options) if has_bias else {}),
        f"{q.dtype}": q.dtype not in TRITON_DTYPES,
        "tables without work": not has_work,
    }
    unsupported = {"triton": _holding(triton_reasons), "torch": _holding(torch_reasons)}
    if q.device.type == "cpu":
        unsupported["rust"] = cpu_decode.unsupported(inputs) + _holding(torch_reasons)
    return unsupported


def cross_entropy_unsupported(dtype: torch.dtype) -> Unsupported:
    """Reasons why a call of `cross_entropy` on hidden states of a dtype is unsupported, by backend."""
    return {"triton": _holding({f"{dtype}": dtype == torch.float64})}


def explain_backends(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, *, has_bias: bool = False
) -> dict[str, str]:
    """Backend that each operator of a model runs on, and why no faster one, by operator.

    Args:
        backend: Backend of the model.
        device: Device of the model.
        dtype: Compute dtype of the model.
        head_dim: Head dim of the model.
        has_bias: Whether the model's attention has a position bias.
    """
    x = torch.empty(1, 1, head_dim, dtype=dtype, device=device)
    unsupported = {
        "attn": packed_unsupported(AttnInputs(x, x, x), AttnOptions(1.0), backend.sizes, has_bias=has_bias),
        "attn_decode": decode_unsupported(
            DecodeInputs(x, x, x, x), AttnOptions(1.0), has_work=backend.decode.users > 0, has_bias=has_bias
        ),
        "cross_entropy": cross_entropy_unsupported(dtype),
    }
    descriptions = dict.fromkeys(unsupported, DESCRIPTIONS)
    if device.type == "cpu" and cpu_dense.is_used(dtype, head_dim):
        descriptions["attn"] = DESCRIPTIONS | {"torch": f"{DESCRIPTIONS['torch']}, long texts in rust"}
    return {op: describe_choice(backend.name, device, unsupported[op], descriptions[op]) for op in unsupported}
