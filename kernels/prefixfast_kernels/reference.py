"""The specification in plain torch: attention over [prefix blocks; keys], one segment at a time.

The code is slow, differentiable, and exact in fp64. Every other backend is tested against this module, and this module
is tested against torch's SDPA on concatenated [prefix; keys] (tests/kernels/test_reference.py).
Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows, S segments,
R decode rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnInputs, AttnOptions, DecodeInputs, OutputLayer
from prefixfast_kernels.tables import DecodeTables, PackedTables


def attn(
    inputs: AttnInputs, tables: PackedTables, options: AttnOptions, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of packed ragged segments, each over its prefix blocks and its own keys.

    Args:
        inputs: Queries, keys, values and prefix rows.
        tables: Segments, blocks and uses. The other tables are for other backends.
        options: Scale, window, soft cap, causality.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, added to the scores by clamped (key position - query position), or
            None.

    Returns:
        Output ``[N, HQ, D]`` in the dtype of ``q`` and the natural log-sum-exp ``[N, HQ]`` (fp32, fp64 for fp64).
        A query without visible keys gives 0 and -inf.

    Source:
        Li & Liang 2021 (arXiv:2101.00190), equation 7.
    """
    q, k, v, prefix_k, prefix_v, slots = inputs
    o = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=accumulator(q.dtype))
    uses, indptr, blocks = tables.use.tolist(), tables.use_indptr.tolist(), tables.block.tolist()
    for s, ((row, rows, key, keys), first) in enumerate(zip(tables.seg.tolist(), tables.seg_pos.tolist(), strict=True)):
        own = slots[key : key + keys].long() if slots is not None else torch.arange(key, key + keys, device=q.device)
        parts = [_Keys(k[own], v[own], 0, slides=True, causal=options.causal)]
        for block, pos, slides in uses[indptr[s] : indptr[s + 1]]:
            start, length = blocks[block]
            assert prefix_k is not None
            assert prefix_v is not None
            part = slice(start, start + length)
            parts.append(_Keys(prefix_k[part], prefix_v[part], pos, slides=bool(slides), causal=False))
        out, stat = _segment_attention(q[row : row + rows], first, parts, options, bias)
        # Autograd goes through index_copy out of place.
        where = torch.arange(row, row + rows, device=q.device)
        o, lse = o.index_copy(0, where, out), lse.index_copy(0, where, stat)
    return o, lse


def attn_decode(
    inputs: DecodeInputs, tables: DecodeTables, options: AttnOptions, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row over its prefix blocks and the arena rows that the slot table names.

    Args:
        inputs: Queries, arena, slot table and prefix rows.
        tables: Rows, lengths, blocks and uses. The other tables are for other backends.
        options: Scale, window, soft cap.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, added to the scores by clamped (key position - query position), or
            None.

    Returns:
        Output ``[R, HQ, D]`` in the dtype of ``q`` and the natural log-sum-exp ``[R, HQ]`` (fp32, fp64 for fp64).
    """
    q, table = inputs.q, inputs.slot_table
    slots = torch.cat([table[r, :n] for r, n in zip(tables.row.tolist(), tables.lens.tolist(), strict=True)])
    lens = tables.lens.long()
    rows = torch.arange(len(lens), device=q.device)
    seg = torch.stack([rows, torch.ones_like(rows), lens.cumsum(0) - lens, lens], 1)
    empty = slots[:0]
    packed = PackedTables(
        *tables.blocks,
        seg=seg,
        seg_pos=lens - 1,
        bucket=empty,
        gather=empty,
        scatter=empty,
        tiles=empty,
        key_tiles=empty,
        block_tiles=empty,
    )
    same = AttnInputs(q, inputs.k_arena, inputs.v_arena, *inputs.prefix, slots)
    return attn(same, packed, options._replace(causal=True), bias)


def linear_cross_entropy(hidden: Tensor, layer: OutputLayer, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row's target under ``softmax(hidden @ weight.T + bias)``.

    Args:
        hidden: Hidden states ``[n, d]``.
        layer: Weight ``[V, d]``, bias and soft cap of the output layer.
        targets: Target tokens ``[n]``, int64.

    Returns:
        Losses ``[n]`` (fp32, fp64 for fp64).
    """
    dtype = accumulator(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, layer.weight, layer.bias).to(dtype)
    if layer.softcap:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores and log-sum-exps: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Keys:
    """Keys and values of one prefix block or of one segment, with their positions and visibility."""

    def __init__(self, k: Tensor, v: Tensor, first: int, *, slides: bool, causal: bool) -> None:
        self.k, self.v, self.slides, self.causal = k, v, slides, causal
        self.pos = torch.arange(first, first + len(k), device=k.device)

    def visible(self, query_pos: Tensor, window: int) -> Tensor:
        """Whether each query sees each key, bool ``[n, keys]``."""
        distance = query_pos[:, None] - self.pos[None]
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return seen & (distance < window) if window and self.slides else seen


def _segment_attention(
    q: Tensor, first: int, parts: list[_Keys], options: AttnOptions, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one segment whose first query is at position ``first``."""
    dtype = accumulator(q.dtype)
    group = q.shape[1] // parts[0].k.shape[1]
    k = torch.cat([p.k.to(q.dtype) for p in parts]).to(dtype).repeat_interleave(group, 1)
    v = torch.cat([p.v.to(q.dtype) for p in parts]).to(dtype).repeat_interleave(group, 1)
    query_pos = torch.arange(first, first + len(q), device=q.device)
    scores = torch.einsum("nhd,mhd->nhm", q.to(dtype), k) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if bias is not None:
        maxd = (bias.shape[1] - 1) // 2
        distance = torch.cat([p.pos for p in parts])[None] - query_pos[:, None]
        scores = scores + bias[:, distance.clamp(-maxd, maxd) + maxd].transpose(0, 1).to(dtype)
    seen = torch.cat([p.visible(query_pos, options.window) for p in parts], 1)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isneginf()[..., None], 0.0, (scores - lse[..., None]).exp())
    return torch.einsum("nhm,mhd->nhd", weights, v).to(q.dtype), lse
