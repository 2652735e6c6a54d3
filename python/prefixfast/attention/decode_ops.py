"""Custom operators of decode steps: writing new keys and values to the arena, and attention of one query per row.

Tables cross an operator as a list of int32 tensors in the order of `DecodeTables`.
Shape letters: N new tokens, R decode rows, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixfast.attention import cpu_decode, cpu_write
from prefixfast.attention.backend_support import decode_unsupported
from prefixfast.attention.backends import select_backend
from prefixfast.attention.operator import operator
from prefixfast_kernels import reference
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.torch_decode import decode_fwd


@operator("prefixfast::kv_write", mutates_args=("k_arena", "v_arena"))
def kv_write(k_arena: Tensor, v_arena: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write new keys and values to rows of the arena, in place.

    Args:
        k_arena: Keys of the arena ``[arena rows, H, D]``.
        v_arena: Values of the arena ``[arena rows, H, D]``.
        k: New keys ``[N, H, D]``, cast to the dtype of ``k_arena``.
        v: New values ``[N, H, D]``, cast to the dtype of ``v_arena``.
        slots: Arena rows of the new tokens, int32 ``[N]``.
    """
    if cpu_write.write_rows((k_arena, v_arena), (k, v), slots):
        return
    index = slots.long()
    k_arena.index_copy_(0, index, k.to(k_arena.dtype))
    v_arena.index_copy_(0, index, v.to(v_arena.dtype))


@kv_write.custom_op.register_fake
def _(k_arena: Tensor, v_arena: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    return None


@operator("prefixfast::attn_decode")
def attn_decode(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    slot_table: Tensor,
    tables: list[Tensor],
    bias: Tensor | None,
    max_len: int,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
    users: int,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row over its prefix blocks and the arena rows of its slots. It has no gradient.

    Args:
        q: Queries ``[R, HQ, D]``.
        k_arena: Keys of the arena ``[arena rows, H, D]``.
        v_arena: Values of the arena ``[arena rows, H, D]``.
        prefix_k: Prefix keys ``[rows, H, D]`` outside the arena, or None if the prefix rows are rows of ``k_arena``.
        prefix_v: Prefix values ``[rows, H, D]`` outside the arena, or None.
        slot_table: Arena row of each token of each row, int32 ``[rows, Tmax]``.
        tables: `DecodeTables`, in order.
        bias: Position bias ``[HQ, 2 * maxd + 1]`` by clamped (key position - query position), or None.
        max_len: Length of the longest row of the step in tokens.
        scale: Factor on the scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Cap of the scores, 0 for none.
        backend: ``"auto"`` or one of `BACKENDS`.
        users: `DecodeSizes.users` that the work of the tables was made for, 0 for tables without work.

    Returns:
        Output ``[R, HQ, D]`` and the natural log-sum-exp ``[R, HQ]``.
    """
    inputs = DecodeInputs(q, k_arena, v_arena, slot_table, prefix_k, prefix_v)
    step, options = DecodeTables(*tables), AttnOptions(scale, window, softcap)
    has_work = bool(users) and len(step.work) > 0
    unsupported = decode_unsupported(inputs, options, has_work=has_work, has_bias=bias is not None)
    chosen = select_backend("attn_decode", backend, q.device, unsupported)
    if chosen == "triton":
        from prefixfast_kernels import prefix_decode  # triton is installed on machines with a GPU only

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return prefix_decode.attn_decode(inputs, step, options, users, bias)
    if chosen == "rust":
        return cpu_decode.decode(inputs, step, options, bias)
    if chosen == "torch":
        return decode_fwd(inputs, step, max_len, options, bias)
    return reference.attn_decode(inputs, step, options, bias)


@attn_decode.custom_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))
