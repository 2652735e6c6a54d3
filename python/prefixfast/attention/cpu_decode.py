"""Decode attention on the CPU, in Rust: checks of the arguments, and the threads that the call runs on.

The memory accesses of the Rust code (`rust/core/src/attend.rs`) are safe because of the checks here.
Shape letters: R rows, T longest row, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from prefixfast.errors import ConfigError
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import DecodeTables

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
IS_BF16 = {torch.float32: False, torch.bfloat16: True}  # by supported dtype
TABLES = ("block", "use_indptr", "use", "row", "lens")


@functools.cache
def _rust() -> ModuleType | None:
    """The Rust extension, or None if it is not built; the kernels work without it."""
    try:
        from prefixfast import _rust
    except ImportError:
        return None
    return _rust


@functools.cache
def _joined_openmp() -> bool:
    """Whether the threads of torch's OpenMP runtime can be used. Without them a call runs on its own thread."""
    rust = _rust()
    assert rust is not None
    reason = rust.attend_join(torch._C.__file__)
    if reason is not None:
        logger.warning("decode attention runs on one thread: %s", reason)
    return reason is None


def num_threads() -> int:
    """Number of threads of a call of the Rust core, which are those of torch."""
    return torch.get_num_threads() if _joined_openmp() else 1


def unsupported(inputs: DecodeInputs) -> list[str]:
    """Reasons why a call with these queries, arena and prefix rows is unsupported; empty if supported."""
    q, pairs = inputs.q, ((inputs.k_arena, inputs.v_arena), inputs.prefix)
    if _rust() is None:
        return ["calls without the Rust extension (`make` builds it)"]
    if q.dtype not in IS_BF16:
        return [f"{q.dtype}"]
    if any(k.dtype not in IS_BF16 or k.dtype != v.dtype for k, v in pairs):
        return ["keys and values in " + ", ".join(f"{t.dtype}" for pair in pairs for t in pair)]
    if not all(k.is_contiguous() and v.is_contiguous() for k, v in pairs):
        return ["keys and values that are not contiguous"]
    if q.shape[2] > MAX_HEAD_DIM:
        return [f"head dims over {MAX_HEAD_DIM}"]
    return []


def decode(
    inputs: DecodeInputs,
    tables: DecodeTables,
    options: AttnOptions,
    bias: Tensor | None = None,
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attn_decode` on the CPU, with keys and values read in place.

    Args:
        inputs: Queries ``[R, HQ, D]`` in fp32 or bf16 with any strides; arena and prefix rows in fp32 or bf16,
            contiguous, read as they are; the slot table, int32, with the entries of a row next to each other.
        tables: Tables of the step. A row's prefix blocks are read in the order of its uses.
        options: Scale, window, soft cap.
        bias: Position bias ``[HQ, 2 * maxd + 1]`` in fp32, contiguous, without a soft cap, or None.
        path: Name of the vector instructions, one of ``_rust.attend_paths()``. None takes those of the environment
            variable ``PREFIXFAST_SIMD``, or the fastest.

    Returns:
        Output ``[R, HQ, D]`` in the dtype of ``q`` and the natural log-sum-exp ``[R, HQ]`` in fp32. A row's result
        depends on no other row, to the bit.

    Raises:
        ConfigError: If shapes do not match, a table has another dtype, an entry names no row, a row has neither own
            keys nor blocks, there are both a bias and a soft cap, or ``path`` is unknown.
    """
    q, (prefix_k, prefix_v) = inputs.q, inputs.prefix
    k_arena, v_arena, slot_table = inputs.k_arena, inputs.v_arena, inputs.slot_table
    num_rows, num_heads, head_dim = q.shape
    read = [getattr(tables, name) for name in TABLES]
    _check_arguments(inputs, read)
    bias_memory = None if bias is None else _bias_memory(bias, num_heads)
    if q.stride(2) != 1:
        q = q.contiguous()
    row_stride, head_stride, _ = q.stride()
    span = (num_rows - 1) * row_stride + (num_heads - 1) * head_stride + head_dim if q.numel() else 0
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    rust = _rust()
    assert rust is not None
    rust.attend_decode(
        (num_rows, num_heads, k_arena.shape[1], head_dim),
        (q.data_ptr(), span, row_stride, head_stride, IS_BF16[q.dtype]),
        (o.data_ptr(), lse.data_ptr()),
        (k_arena.data_ptr(), v_arena.data_ptr(), k_arena.numel(), IS_BF16[k_arena.dtype]),
        (prefix_k.data_ptr(), prefix_v.data_ptr(), prefix_k.numel(), IS_BF16[prefix_k.dtype]),
        (slot_table.data_ptr(), *slot_table.shape, slot_table.stride(0)),
        [(t.data_ptr(), t.numel()) for t in read],
        options.scale,
        options.window,
        options.softcap,
        num_threads(),
        path,
        bias_memory,
    )
    return o, lse


def _bias_memory(bias: Tensor, num_heads: int) -> tuple[int, int, int]:
    """Address, number of elements and largest distance of a position bias.

    Raises:
        ConfigError: If the bias is not what Rust reads.
    """
    fits = bias.dim() == 2 and len(bias) == num_heads and bias.shape[1] % 2 == 1
    if not fits or bias.dtype != torch.float32 or not bias.is_contiguous() or not bias.is_cpu:
        msg = (
            f"position bias {list(bias.shape)} of {bias.dtype} on {bias.device}: expected contiguous torch.float32 "
            f"[{num_heads}, 2 * distances + 1] on the CPU"
        )
        raise ConfigError(msg)
    return bias.data_ptr(), bias.numel(), bias.shape[1] // 2


def _check_arguments(inputs: DecodeInputs, tables: list[Tensor]) -> None:
    """Check that the addresses passed to Rust are those of tensors of the expected shapes, dtypes and strides.

    Rust checks the entries of the tables where it reads them.

    Args:
        inputs: Queries, arena, slot table and prefix rows of the call.
        tables: Tables of the step, in the order of `TABLES`.
    """
    q, slot_table, arena = inputs.q, inputs.slot_table, (inputs.k_arena, inputs.v_arena)
    expected = (*inputs.k_arena.shape[1:2], q.shape[2])
    for k, v in (arena, inputs.prefix):
        if k.dim() != 3 or k.shape != v.shape or k.shape[1:] != expected:
            msg = (
                f"keys {list(k.shape)} and values {list(v.shape)}: expected both [rows, kv heads, {q.shape[2]}], with "
                "the same kv heads in the arena and the prefix"
            )
            raise ConfigError(msg)
    if slot_table.dtype != torch.int32 or slot_table.dim() != 2 or slot_table.stride(1) != 1:
        msg = (
            f"slot table {list(slot_table.shape)} of {slot_table.dtype}: expected [rows, tokens] of torch.int32, with "
            "the entries of a row next to each other"
        )
        raise ConfigError(msg)
    for name, t in zip(TABLES, tables, strict=True):
        if t.dtype != torch.int32 or not t.is_contiguous():
            msg = f"table {name} of {t.dtype}: expected contiguous torch.int32, as the planner makes it"
            raise ConfigError(msg)
    for t in (q, *arena, *inputs.prefix, slot_table, *tables):
        if not t.is_cpu:
            msg = f"got a tensor on {t.device}: expected all tensors on the CPU; move it there"
            raise ConfigError(msg)
