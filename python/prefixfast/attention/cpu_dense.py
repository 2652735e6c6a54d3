"""Attention of many queries over the same keys on the CPU, in Rust.

Shape letters: B sequences, T queries and S keys of each, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.cpu_decode import IS_BF16, MAX_HEAD_DIM, num_threads
from prefixfast_kernels.inputs import AttnOptions
from prefixfast_kernels.torch_mask import Mask
from prefixfast_kernels.torch_sdpa_lse import Qkv, sdpa_lse_fwd

MIN_QUERIES, MIN_SCORES, MIN_KEYS = 16, 4096, 64  # about as many as Rust needs to be faster than torch


def sdpa_lse(qkv: Qkv, mask: Mask | None, options: AttnOptions, *, causal: bool) -> tuple[Tensor, Tensor]:
    """`sdpa_lse_fwd`, in Rust where that is the faster way."""
    q, k, _ = qkv
    is_plain = mask is None and not options.softcap and is_used(q.dtype, q.shape[3])
    num_queries, num_keys = q.shape[2], k.shape[2]
    is_large = num_queries >= MIN_QUERIES and num_queries * num_keys >= MIN_SCORES
    # A product of one row takes torch twice as long in bf16, as at the decoder's start token over a text.
    is_start = q.dtype == torch.bfloat16 and num_queries == 1 and num_keys >= MIN_KEYS
    if not (is_plain and (is_large or is_start)):
        return sdpa_lse_fwd(qkv, mask, options, causal=causal)
    return dense(qkv, options.scale, causal=causal)


def is_used(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `sdpa_lse` runs in Rust for long texts without a mask.

    Args:
        dtype: Dtype of queries, keys and values.
        head_dim: Head dim.
    """
    return dtype in IS_BF16 and head_dim <= MAX_HEAD_DIM and is_fast()


@functools.cache
def is_fast() -> bool:
    """Whether Rust is faster than torch's operator. With narrower vectors it is not."""
    return os.environ.get("PREFIXFAST_SIMD", _rust.attend_paths()[0]).startswith("avx512")


def dense(qkv: Qkv, scale: float, *, causal: bool, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Attention of every query over the keys of its sequence.

    Args:
        qkv: Queries ``[B, HQ, T, D]``, keys and values ``[B, H, S, D]`` on a CPU, all fp32 or all bf16, with any
            strides.
        scale: Factor on the scores.
        causal: Whether query i sees the first i + 1 keys instead of all.
        path: Name of the vector instructions, one of ``_rust.attend_paths()``. None takes those of the environment
            variable ``PREFIXFAST_SIMD``, or the fastest.

    Returns:
        Output ``[B, HQ, T, D]`` and the natural log-sum-exp ``[B, HQ, T]`` in fp32. The result of a query depends on no
        other query, to the bit.
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in qkv)
    assert k.shape == v.shape
    assert q.dtype == k.dtype == v.dtype
    o, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3])
    batch, heads, num_queries, head_dim = q.shape
    _rust.attend_dense(
        (batch, heads, k.shape[1], head_dim),
        (num_queries, k.shape[2]),
        [_memory(t) for t in (q, k, v)],
        IS_BF16[q.dtype],
        (o.data_ptr(), lse.data_ptr()),
        scale,
        causal,
        num_threads(),
        path,
    )
    return o, lse


def _memory(t: Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """Address, number of elements up to the last one, and strides of the first three dims."""
    batch, heads, rows, one = t.stride()
    span = sum((n - 1) * stride for n, stride in zip(t.shape, (batch, heads, rows, one), strict=True)) + 1
    return t.data_ptr(), span, (batch, heads, rows)
