"""Decode attention on the CPU, in Rust (`rust/core/src/attend.rs`): the checks that its memory accesses rest on, and the threads it runs on.

Shape letters: R rows, T longest row, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from prefixfast.errors import ConfigError
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.torch_sdpa_lse import Options

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
NARROW = {torch.float32: False, torch.bfloat16: True}
TABLES = ("block", "user_indptr", "user", "user_pos", "user_slides", "row", "lens")


@functools.cache
def _rust() -> ModuleType | None:
    """The extension; None where it is not built (the kernels work without it)."""
    try:
        from prefixfast import _rust
    except ImportError:
        return None
    return _rust


@functools.cache
def _runs_on_torchs_threads() -> bool:
    """Whether the threads of torch's OpenMP runtime can be used; without them a call runs on its own thread."""
    rust = _rust()
    assert rust is not None
    reason = rust.attend_join(torch._C.__file__)
    if reason is not None:
        logger.warning("decode attention runs on one thread: %s", reason)
    return reason is None


def cannot(
    q: Tensor, k_arena: Tensor, v_arena: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None
) -> dict[str, bool]:
    """What of this call `decode` does not serve, as `ops` picks a backend; empty if it serves all."""
    pairs = ((k_arena, v_arena), (prefix_k, prefix_v))
    if _rust() is None:
        reason = "calls without the Rust extension (`make` builds it)"
    elif bias is not None:
        reason = "a position bias"
    elif q.dtype not in NARROW:
        reason = f"{q.dtype}"
    elif any(k.dtype not in NARROW or k.dtype != v.dtype for k, v in pairs):
        reason = "keys and values in " + ", ".join(f"{t.dtype}" for t in (k_arena, v_arena, prefix_k, prefix_v))
    elif not all(k.is_contiguous() and v.is_contiguous() for k, v in pairs):
        reason = "keys and values with gaps"
    elif q.shape[2] > MAX_HEAD_DIM:
        reason = f"head dims over {MAX_HEAD_DIM}"
    else:
        return {}
    return {reason: True}


def decode(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    table: Tensor,
    tables: DecodeTables,
    options: Options,
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attn_decode` on the CPU, where keys and values lie; `cannot` says which calls it serves.

    Args:
        q: ``[R, HQ, D]`` fp32 or bf16, any strides.
        k_arena: ``[arena rows, H, D]`` fp32 or bf16, contiguous.
        v_arena: As ``k_arena``.
        prefix_k: Where the prefix rows lie, ``[rows, H, D]`` fp32 or bf16, read as they are; may be ``k_arena``.
        prefix_v: As ``prefix_k``.
        table: ``[rows, Tmax]`` int32, entries of a row next to each other.
        tables: See `DecodeTables`; what a row sees is taken from the users of the blocks.
        options: Scale, window, soft cap.
        path: Instructions, a name of ``_rust.attend_paths()``; None: those of ``PREFIXFAST_SIMD``, else the best.

    Returns:
        ``o [R, HQ, D]`` in the dtype of ``q`` and the natural log-sum-exp ``[R, HQ]`` fp32. A row's result does not depend on the others to the bit.

    Raises:
        ConfigError: Shapes that do not fit, tables of another dtype, an entry that names no row, a row without keys; an unknown ``path``.
    """
    num_rows, num_heads, head_dim = q.shape
    read = [getattr(tables, name) for name in TABLES]
    _check(q, (k_arena, v_arena, prefix_k, prefix_v), table, read)
    if q.stride(2) != 1:
        q = q.contiguous()
    row_stride, head_stride, _ = q.stride()
    span = (num_rows - 1) * row_stride + (num_heads - 1) * head_stride + head_dim if q.numel() else 0
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    rust = _rust()
    assert rust is not None
    rust.attend_decode(
        (num_rows, num_heads, k_arena.shape[1], head_dim),
        (q.data_ptr(), span, row_stride, head_stride, NARROW[q.dtype]),
        (o.data_ptr(), lse.data_ptr()),
        (k_arena.data_ptr(), v_arena.data_ptr(), k_arena.numel(), NARROW[k_arena.dtype]),
        (prefix_k.data_ptr(), prefix_v.data_ptr(), prefix_k.numel(), NARROW[prefix_k.dtype]),
        (table.data_ptr(), *table.shape, table.stride(0)),
        [(t.data_ptr(), t.numel()) for t in read],
        options.scale,
        options.window,
        options.softcap,
        torch.get_num_threads() if _runs_on_torchs_threads() else 1,
        path,
    )
    return o, lse


def _check(q: Tensor, kv: tuple[Tensor, ...], table: Tensor, read: list[Tensor]) -> None:
    """What the addresses below stand for; entries of the tables are checked where they are read."""
    like = (*kv[0].shape[1:2], q.shape[2])
    for k, v in (kv[:2], kv[2:]):
        if k.dim() != 3 or k.shape != v.shape or k.shape[1:] != like:
            msg = f"keys {list(k.shape)} and values {list(v.shape)}: expected both [rows, kv heads, {q.shape[2]}], the arena's and the prefix's alike"
            raise ConfigError(msg)
    if table.dtype != torch.int32 or table.dim() != 2 or table.stride(1) != 1:
        msg = f"slot table {list(table.shape)} of {table.dtype}: expected [rows, tokens] of int32, entries of a row next to each other"
        raise ConfigError(msg)
    for name, t in zip(TABLES, read, strict=True):
        if t.dtype != torch.int32 or not t.is_contiguous():
            msg = f"table {name} of {t.dtype}: expected contiguous int32, as the planner makes it"
            raise ConfigError(msg)
    for t in (q, *kv, table, *read):
        if not t.is_cpu:
            msg = f"a tensor on {t.device} among tensors on the CPU: expected all on the CPU; move it there"
            raise ConfigError(msg)
