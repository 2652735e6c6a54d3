"""The specification: attention over [prefix blocks; keys] in plain torch, one segment at a time. Slow, differentiable, exact in fp64.

Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows, S segments, R decode rows.
Every other backend is held to this file; this file is held to torch's SDPA on concatenated [prefix; keys] (tests/kernels/test_reference.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast_kernels.tables import DecodeTables, PackedTables


def attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    tables: PackedTables,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    slots: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed ragged segments, each over its prefix blocks and its own keys.

    Args:
        q: Queries ``[N, HQ, D]``.
        k: Keys ``[M, H, D]``, ``HQ % H == 0``; query head h reads kv head ``h // (HQ // H)``.
        v: Values, as ``k``.
        prefix_k: Prefix keys ``[sum P, H, D]``; may be ``k`` itself (an arena) or None without prefixes.
        prefix_v: Prefix values, as ``prefix_k``.
        tables: Segments, blocks and uses; all else in it is for other backends.
        scale: Multiplies ``q @ k.T``.
        window: A key at position p is seen from position t only if ``p > t - window``; 0 sees all.
        softcap: ``softcap * tanh(score / softcap)``; 0 leaves scores alone.
        causal: Hide keys after the query; prefix rows are never after.
        slots: If given, key j of a segment is row ``slots[first key + j]`` of ``k``.
        bias: ``[HQ, 2 * maxd + 1]`` added by clamped (key position - query position).

    Returns:
        Output ``[N, HQ, D]`` in the dtype of ``q`` and the natural log-sum-exp ``[N, HQ]`` (fp32, fp64 for fp64);
        a query that sees nothing gives 0 and -inf.

    Source:
        Li & Liang 2021 (arXiv:2101.00190), equation 7.
    """
    o = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=accumulator(q.dtype))
    uses, indptr, blocks = tables.use.tolist(), tables.use_indptr.tolist(), tables.block.tolist()
    for s, ((row, rows, key, keys), first) in enumerate(zip(tables.seg.tolist(), tables.seg_pos.tolist(), strict=True)):
        own = slots[key : key + keys].long() if slots is not None else torch.arange(key, key + keys, device=q.device)
        parts = [_Part(k[own], v[own], 0, slides=True, causal=causal)]
        for block, pos, slides in uses[indptr[s] : indptr[s + 1]]:
            start, length = blocks[block]
            assert prefix_k is not None
            assert prefix_v is not None
            part = slice(start, start + length)
            parts.append(_Part(prefix_k[part], prefix_v[part], pos, slides=bool(slides), causal=False))
        out, stat = _attend(q[row : row + rows], first, parts, scale, window, softcap, bias)
        # index_put out of place: autograd goes through
        where = torch.arange(row, row + rows, device=q.device)
        o, lse = o.index_copy(0, where, out), lse.index_copy(0, where, stat)
    return o, lse


def attn_decode(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    table: Tensor,
    tables: DecodeTables,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query a row over its prefix blocks and the arena rows that the slot table names.

    Args:
        q: Queries ``[R, HQ, D]``.
        k_arena: Keys ``[arena rows, H, D]``.
        v_arena: Values, as ``k_arena``.
        prefix_k: Prefix keys; None where they are rows of ``k_arena``.
        prefix_v: Prefix values, as ``prefix_k``.
        table: ``[rows, Tmax]`` arena row of each token of each row.
        tables: Rows, lengths, blocks and uses.
        scale: As in `attn`; so are ``window``, ``softcap`` and ``bias``.
        window: See `attn`.
        softcap: See `attn`.
        bias: See `attn`.

    Returns:
        As `attn`: ``[R, HQ, D]`` and ``[R, HQ]``.
    """
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
    pk, pv = (k_arena, v_arena) if prefix_k is None else (prefix_k, prefix_v)
    return attn(
        q, k_arena, v_arena, pk, pv, packed, scale=scale, window=window, softcap=softcap, slots=slots, bias=bias
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, softcap: float = 0.0
) -> Tensor:
    """Negative log-likelihood of each row's target under ``softmax(hidden @ weight.T + bias)``.

    Args:
        hidden: ``[n, d]``.
        weight: ``[V, d]``.
        bias: ``[V]`` or None.
        targets: ``[n]`` int64.
        softcap: ``softcap * tanh(logit / softcap)``; 0 leaves logits alone.

    Returns:
        Losses ``[n]`` (fp32, fp64 for fp64).
    """
    dtype = accumulator(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias).to(dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and log-sum-exps: fp32, or fp64 where the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Part:
    """Keys of one kind, with their positions and visibility."""

    def __init__(self, k: Tensor, v: Tensor, first: int, *, slides: bool, causal: bool) -> None:
        self.k, self.v, self.slides, self.causal = k, v, slides, causal
        self.pos = torch.arange(first, first + len(k), device=k.device)

    def visible(self, query_pos: Tensor, window: int) -> Tensor:
        """``[n, keys]``: which keys each query sees."""
        distance = query_pos[:, None] - self.pos[None]
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return seen & (distance < window) if window and self.slides else seen


def _attend(
    q: Tensor, first: int, parts: list[_Part], scale: float, window: int, softcap: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(q.dtype)
    group = q.shape[1] // parts[0].k.shape[1]
    k = torch.cat([p.k.to(q.dtype) for p in parts]).to(dtype).repeat_interleave(group, 1)
    v = torch.cat([p.v.to(q.dtype) for p in parts]).to(dtype).repeat_interleave(group, 1)
    query_pos = torch.arange(first, first + len(q), device=q.device)
    scores = torch.einsum("nhd,mhd->nhm", q.to(dtype), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        maxd = (bias.shape[1] - 1) // 2
        distance = torch.cat([p.pos for p in parts])[None] - query_pos[:, None]
        scores = scores + bias[:, distance.clamp(-maxd, maxd) + maxd].transpose(0, 1).to(dtype)
    seen = torch.cat([p.visible(query_pos, window) for p in parts], 1)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isneginf()[..., None], 0.0, (scores - lse[..., None]).exp())
    return torch.einsum("nhm,mhd->nhd", weights, v).to(q.dtype), lse
