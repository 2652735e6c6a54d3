"""The `torch` backend of decode attention: keys gathered through the slot table, prefixes read in place, merged by log-sum-exp.

Shape letters: R rows (one query each), T longest row, HQ query heads, H kv heads, G queries per kv head, D head dim. Specification: `reference.attn_decode`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.torch_attn import merge_blocks
from prefixfast_kernels.torch_sdpa_lse import Options, piece_fwd


def decode_fwd(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    table: Tensor,
    tables: DecodeTables,
    max_len: int,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn_decode`.

    Args:
        q: ``[R, HQ, D]``.
        k_arena: ``[arena rows, H, D]``.
        v_arena: As ``k_arena``.
        prefix_k: Where the prefix rows live; may be ``k_arena``.
        prefix_v: As ``prefix_k``.
        table: ``[rows, Tmax]`` int32.
        tables: See `DecodeTables`.
        max_len: Longest row of the step.
        options: Scale, window, soft cap.

    Returns:
        ``[R, HQ, D]`` and the natural log-sum-exp ``[R, HQ]``.
    """
    num_rows, num_heads = q.shape[:2]
    num_kv_heads = k_arena.shape[1]
    slots = table.index_select(0, tables.row)[:, :max_len]
    pos = torch.arange(max_len, device=q.device)
    seen = pos < tables.lens[:, None]
    if options.window:
        seen &= pos >= tables.lens[:, None] - options.window
    slots = torch.where(pos < tables.lens[:, None], slots, slots[:, :1])  # entries past the end are stale
    keys, values = (
        a.index_select(0, slots.flatten()).view(num_rows, max_len, num_kv_heads, -1).transpose(1, 2)
        for a in (k_arena, v_arena)
    )
    mask = torch.zeros(num_rows, 1, 1, max_len, dtype=q.dtype, device=q.device).masked_fill_(
        ~seen[:, None, None], -torch.inf
    )
    grouped = q.view(
        num_rows, num_kv_heads, num_heads // num_kv_heads, -1
    )  # the G queries of a kv head share its keys: [R, H, G, D]
    mask = mask.expand(-1, 1, grouped.shape[2], -1)
    o, lse = piece_fwd(grouped, keys.to(q.dtype), values.to(q.dtype), mask, options, causal=False)
    o, lse = o.reshape(q.shape).contiguous(), lse.reshape(num_rows, num_heads).contiguous()
    merge_blocks(o, lse, q, prefix_k, prefix_v, tables.blocks, options)
    return o, lse
