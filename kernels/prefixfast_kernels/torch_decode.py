"""The `torch` backend of decode attention: own keys gathered through the slot table, prefixes read in place.

The two parts are merged by log-sum-exp. Specification: `reference.attn_decode`.
Shape letters: R rows (one query each), T longest row, HQ query heads, H kv heads, G queries per kv head, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.torch_attn import merge_prefix_blocks
from prefixfast_kernels.torch_sdpa_lse import Qkv, sdpa_lse_fwd


def decode_fwd(inputs: DecodeInputs, tables: DecodeTables, max_len: int, options: AttnOptions) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn_decode`.

    Args:
        inputs: Queries, arena, slot table and prefix rows.
        tables: Rows, lengths and blocks of the step.
        max_len: Length of the longest row of the step in tokens.
        options: Scale, window, soft cap.

    Returns:
        Output ``[R, HQ, D]`` and the natural log-sum-exp ``[R, HQ]``.
    """
    q, arena = inputs.q, (inputs.k_arena, inputs.v_arena)
    num_rows, num_heads = q.shape[:2]
    num_kv_heads = inputs.k_arena.shape[1]
    slots = inputs.slot_table.index_select(0, tables.row)[:, :max_len]
    pos = torch.arange(max_len, device=q.device)
    seen = pos < tables.lens[:, None]
    if options.window:
        seen &= pos >= tables.lens[:, None] - options.window
    slots = torch.where(pos < tables.lens[:, None], slots, slots[:, :1])  # entries past a row's end are stale
    keys, values = (
        a.index_select(0, slots.flatten()).view(num_rows, max_len, num_kv_heads, -1).transpose(1, 2) for a in arena
    )
    mask = torch.zeros(num_rows, 1, 1, max_len, dtype=q.dtype, device=q.device)
    mask.masked_fill_(~seen[:, None, None], -torch.inf)
    # The G queries of a kv head share its keys: they are the query rows of one attention, [R, H, G, D].
    grouped = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, -1)
    mask = mask.expand(-1, 1, grouped.shape[2], -1)
    o, lse = sdpa_lse_fwd(Qkv(grouped, keys.to(q.dtype), values.to(q.dtype)), mask, options, causal=False)
    o, lse = o.reshape(q.shape).contiguous(), lse.reshape(num_rows, num_heads).contiguous()
    merge_prefix_blocks((o, lse), q, inputs.prefix, tables.blocks, options)
    return o, lse
