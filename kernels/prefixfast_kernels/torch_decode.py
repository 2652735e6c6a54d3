"""The `torch` backend of decode attention: own keys gathered through the slot table, prefixes read in place.

The two parts are merged by log-sum-exp. Specification: `reference.attn_decode`.
Shape letters: R rows (one query each), T longest row, HQ query heads, H kv heads, G queries per kv head, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.reference import accumulator
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.torch_attn import merge_prefix_blocks
from prefixfast_kernels.torch_mask import bias_at, make_mask
from prefixfast_kernels.torch_sdpa_lse import Qkv, sdpa_lse_fwd


def decode_fwd(
    inputs: DecodeInputs, tables: DecodeTables, max_len: int, options: AttnOptions, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn_decode`.

    Args:
        inputs: Queries, arena, slot table and prefix rows.
        tables: Rows, lengths and blocks of the step.
        max_len: Length of the longest row of the step in tokens. Rows of length 0 see their blocks alone.
        options: Scale, window, soft cap.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, without a soft cap, or None.

    Returns:
        Output ``[R, HQ, D]`` and the natural log-sum-exp ``[R, HQ]``.
    """
    q = inputs.q
    if max_len:
        o, lse = _own_keys(inputs, tables, max_len, options, bias)
    else:
        o, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=accumulator(q.dtype))
    merge_prefix_blocks((o, lse), q, inputs.prefix, tables.blocks, options, bias)
    return o, lse


def _own_keys(
    inputs: DecodeInputs, tables: DecodeTables, max_len: int, options: AttnOptions, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the attention over the own keys."""
    q, arena, lens = inputs.q, (inputs.k_arena, inputs.v_arena), tables.lens[:, None]
    num_rows, num_heads = q.shape[:2]
    num_kv_heads = inputs.k_arena.shape[1]
    slots = inputs.slot_table.index_select(0, tables.row)[:, :max_len]
    pos = torch.arange(max_len, device=q.device)
    seen = pos < lens
    # Entries past a row's end are stale. A row without keys reads row 0 of the arena.
    slots = torch.where(seen, slots, slots[:, :1] * seen[:, :1])
    if options.window:
        seen &= pos >= lens - options.window
    keys, values = (
        a.index_select(0, slots.flatten()).view(num_rows, max_len, num_kv_heads, -1).transpose(1, 2) for a in arena
    )
    # The G queries of a kv head share its keys: they are the query rows of one attention, [R, H, G, D].
    grouped = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, -1)
    by_row = None
    if bias is not None:
        by_row = bias_at(bias, pos + 1 - lens).unflatten(0, grouped.shape[1:3]).permute(2, 0, 1, 3)
    mask = make_mask(seen[:, None, None], by_row, accumulator(q.dtype))
    o, lse = sdpa_lse_fwd(Qkv(grouped, keys.to(q.dtype), values.to(q.dtype)), mask, options, causal=False)
    return o.reshape(q.shape).contiguous(), lse.reshape(num_rows, num_heads).contiguous()
