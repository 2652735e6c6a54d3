"""The `torch` backend of packed attention: one call per distinct prefix over all its tokens, bucketed calls for the tokens' own keys, merged by log-sum-exp.

A prefix block is read where it lies, once for all sequences that use it; nothing of batch x P is built. Specification: `reference.attn`.
Shape letters: N packed tokens, HQ query heads, H kv heads, D head dim, P prefix rows, n sequences of a bucket, T its padded length, E users of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels.reference import accumulator
from prefixfast_kernels.tables import BlockTables, PackedTables
from prefixfast_kernels.torch_sdpa_lse import Options, piece_bwd, piece_fwd

# Under this many sequences one call for each run of equal lengths (views, no padding) beats padded buckets: prototypes/cpu/ragged.py.
LOOP_BELOW = 16


@dataclass(frozen=True)
class _Block:
    """One prefix block and the query rows that see it."""

    rows: slice | Tensor  # of the prefix tensor
    users: slice | Tensor  # query rows
    mask: Tensor | None  # [1, 1, E, P]


def attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    tables: PackedTables,
    options: Options,
    *,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn` for causal self-attention, on separate keys or, with ``slots``, on keys in an arena.

    Args:
        q: ``[N, HQ, D]``, any strides with D contiguous.
        k: ``[N, H, D]``; with ``slots`` ``[arena rows, H, D]`` in any float dtype.
        v: As ``k``.
        prefix_k: ``[sum P, H, D]`` in any float dtype, cast block by block, or None.
        prefix_v: As ``prefix_k``.
        tables: See `PackedTables`; the queries of a segment are its last keys.
        options: Scale, window, soft cap.
        slots: If given, key j of a segment is row ``slots[first key + j]`` of ``k``.

    Returns:
        ``[N, HQ, D]`` and the natural log-sum-exp ``[N, HQ]``.
    """
    arena = (k, v)
    if slots is not None:
        last = torch.cat([slots[key + keys - rows : key + keys] for _, rows, key, keys in tables.seg.tolist()])
        k, v = (t.index_select(0, last).to(q.dtype) for t in arena)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype), device=q.device)
    if tables.seg.shape[0] < LOOP_BELOW:
        for part, n, length in _runs(tables):
            own = [_batch(t[part], n) for t in (q, k, v)]
            po, pl = piece_fwd(own[0], own[1], own[2], _band(length, options, q), options, causal=True)
            _batch(o[part], n).copy_(po)
            _batch(lse[part], n).copy_(pl)
    else:
        padded = [t.index_select(0, tables.gather) for t in (q, k, v)]
        out, stat = torch.empty_like(padded[0]), padded[0].new_empty(padded[0].shape[:2], dtype=lse.dtype)
        for part, n, length in _buckets(tables):
            own = [_batch(t[part], n) for t in padded]
            po, pl = piece_fwd(own[0], own[1], own[2], _band(length, options, q), options, causal=True)
            _batch(out[part], n).copy_(po)
            _batch(stat[part], n).copy_(pl)
        torch.index_select(out, 0, tables.scatter, out=o)
        torch.index_select(stat, 0, tables.scatter, out=lse)
    merge_blocks(o, lse, q, prefix_k, prefix_v, tables.blocks, options)
    if slots is not None:
        _merge(o, lse, q, *arena, _contexts(tables, slots, options.window, q), options)
    return o, lse


def merge_blocks(
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    tables: BlockTables,
    options: Options,
) -> None:
    """Merge attention over the prefix blocks into ``o`` ``[N, HQ, D]`` and ``lse`` ``[N, HQ]``, in place."""
    if prefix_k is not None and prefix_v is not None:
        _merge(o, lse, q, prefix_k, prefix_v, _blocks(tables, options.window, q), options)


def _merge(
    o: Tensor, lse: Tensor, q: Tensor, source_k: Tensor, source_v: Tensor, blocks: Iterable[_Block], options: Options
) -> None:
    for block in blocks:
        keys, values = (_heads(t[block.rows].to(q.dtype)) for t in (source_k, source_v))
        po, pl = piece_fwd(_heads(q[block.users]), keys, values, block.mask, options, causal=False)
        po, pl = po[0].transpose(0, 1), pl[0].T  # [E, HQ, D], [E, HQ]
        own_o, own_l = o[block.users], lse[block.users]
        both = torch.logaddexp(pl, own_l)
        merged = po * (pl - both).exp()[..., None] + own_o * (own_l - both).exp()[..., None]
        o[block.users] = merged.to(o.dtype)
        lse[block.users] = both


def attn_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    tables: PackedTables,
    options: Options,
    *,
    needs_own: bool = True,
    needs_prefix: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `attn_fwd`.

    Args:
        do: Gradient of ``o`` ``[N, HQ, D]``.
        q: As in `attn_fwd`; so are ``k``, ``v``, ``prefix_k``, ``prefix_v``, ``tables`` and ``options``.
        k: See ``q``.
        v: See ``q``.
        prefix_k: See ``q``.
        prefix_v: See ``q``.
        o: Merged output of the forward.
        lse: Merged log-sum-exp of the forward.
        tables: See ``q``.
        options: See ``q``.
        needs_own: Whether q, k or v needs a gradient (layer 0 below a frozen embedding does not).
        needs_prefix: Whether the prefix needs one.

    Returns:
        dq, dk, dv, dprefix_k, dprefix_v (None where not needed); a block's gradient is the sum over all its users, in the dtype of ``prefix_k``.
    """
    dq = dk = dv = dpk = dpv = None
    if needs_own:
        dq, dk, dv = _own_bwd(do, q, k, v, o, lse, tables, options)
    if needs_prefix and prefix_k is not None and prefix_v is not None:
        dpk, dpv = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    if prefix_k is None or prefix_v is None:
        return dq, dk, dv, dpk, dpv
    for block in _blocks(tables.blocks, options.window, q):
        keys, values = (_heads(t[block.rows].to(q.dtype)) for t in (prefix_k, prefix_v))
        gq, gk, gv = piece_bwd(
            _heads(do[block.users]),
            _heads(q[block.users]),
            keys,
            values,
            _heads(o[block.users]),
            lse[block.users].T[None],
            block.mask,
            options,
            causal=False,
        )
        if dq is not None:
            dq[block.users] += gq[0].transpose(0, 1).to(dq.dtype)
        if dpk is not None and dpv is not None:
            dpk[block.rows] += gk[0].transpose(0, 1).to(dpk.dtype)
            dpv[block.rows] += gv[0].transpose(0, 1).to(dpv.dtype)
    return dq, dk, dv, dpk, dpv


def _own_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tables: PackedTables, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    if tables.seg.shape[0] < LOOP_BELOW:
        for part, n, length in _runs(tables):
            g, own_q, own_k, own_v, own_o, own_l = (_batch(t[part], n) for t in (do, q, k, v, o, lse))
            pieces = piece_bwd(g, own_q, own_k, own_v, own_o, own_l, _band(length, options, q), options, causal=True)
            for grad, piece in zip(grads, pieces, strict=True):
                _batch(grad[part], n).copy_(piece)
        return dq, dk, dv
    # the padding's gradient must be zero: its rows repeat a real token
    grad_out = do.new_zeros(len(tables.gather), *do.shape[1:]).index_copy_(0, tables.scatter.long(), do)
    padded = [grad_out, *(t.index_select(0, tables.gather) for t in (q, k, v, o, lse))]
    results = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in padded[1:4]]
    for part, n, length in _buckets(tables):
        g, own_q, own_k, own_v, own_o, own_l = (_batch(t[part], n) for t in padded)
        result = piece_bwd(g, own_q, own_k, own_v, own_o, own_l, _band(length, options, q), options, causal=True)
        for grad, piece in zip(results, result, strict=True):
            _batch(grad[part], n).copy_(piece)
    for grad, source in zip(grads, results, strict=True):
        torch.index_select(source, 0, tables.scatter, out=grad)
    return dq, dk, dv


def _heads(t: Tensor) -> Tensor:
    """``[E, H, D]`` -> view ``[1, H, E, D]``."""
    return t.transpose(0, 1)[None]


def _batch(t: Tensor, n: int) -> Tensor:
    """``[n * T, H, ...]`` -> view ``[n, H, T, ...]``."""
    return t.unflatten(0, (n, -1)).transpose(1, 2)


def _runs(tables: PackedTables) -> Iterator[tuple[slice, int, int]]:
    """Rows, sequences and length of each run of neighbours of one length."""
    for length, run in itertools.groupby(tables.seg.tolist(), key=lambda seg: seg[1]):
        segs = list(run)
        yield slice(segs[0][0], segs[0][0] + len(segs) * length), len(segs), length


def _buckets(tables: PackedTables) -> Iterator[tuple[slice, int, int]]:
    """Place in the padded layout, sequences and padded length of each bucket."""
    start = 0
    for n, length in tables.bucket.tolist():
        yield slice(start, start + n * length), n, length
        start += n * length


def _band(length: int, options: Options, like: Tensor) -> Tensor | None:
    """Additive ``[1, 1, T, T]`` of the sliding window, None where it cannot cut."""
    if not options.window or length <= options.window:
        return None
    pos = torch.arange(length, device=like.device)
    return _additive((pos[:, None] - pos[None] < options.window)[None, None], like)


def _blocks(tables: BlockTables, window: int, like: Tensor) -> Iterator[_Block]:
    for (start, length), (first, count, consecutive), a in zip(
        tables.block.tolist(), tables.span.tolist(), tables.user_indptr.tolist()[:-1], strict=True
    ):
        mask = None
        if window:  # a row that slides is hidden once it lies `window` or more before the query
            own = slice(a, a + count)
            pos = tables.user_pos[own, None] + torch.arange(length, device=like.device)
            mask = _additive(((pos > -window) | (tables.user_slides[own, None] == 0))[None, None], like)
        yield _Block(
            slice(start, start + length),
            slice(first, first + count) if consecutive else tables.user[a : a + count],
            mask,
        )


def _contexts(tables: PackedTables, slots: Tensor, window: int, like: Tensor) -> Iterator[_Block]:
    """The keys of each segment before its queries, as blocks of the arena."""
    for row, rows, key, keys in tables.seg.tolist():
        if context := keys - rows:
            mask = None
            if window:
                pos = (
                    torch.arange(context, device=like.device) - torch.arange(context, keys, device=like.device)[:, None]
                )
                mask = _additive((pos > -window)[None, None], like)
            yield _Block(slots[key : key + context], slice(row, row + rows), mask)


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
