"""The `torch` backend of packed attention: one call per prefix block and calls for the own keys, merged by log-sum-exp.

A prefix block is read in place, once for all sequences that use it; no tensor of batch x P is built. Own keys of few
sequences take one call per run of equal lengths, those of many sequences one call per length bucket. Inference on a CPU
takes one call per sequence and block, and one per run, so that a sequence has the same bits alone and in any batch.
Specification: `reference.attn`.
Shape letters: N packed tokens, HQ query heads, H kv heads, D head dim, P prefix rows, n sequences of a bucket,
T padded length of a bucket, E users of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnGrads, AttnInputs, AttnOptions, NeedsGrad, OutputGrad
from prefixfast_kernels.reference import accumulator
from prefixfast_kernels.tables import BlockTables, PackedTables
from prefixfast_kernels.torch_sdpa_lse import Qkv, sdpa_lse_bwd, sdpa_lse_fwd

# Below this many sequences, one call per run of equal lengths (views, no padding) is faster on CPUs than padded
# buckets.
MIN_SEQUENCES_FOR_BUCKETS = 16


@dataclass(frozen=True)
class _Block:
    """Consecutive keys that several query rows see, a prefix block or the context of a continued prompt.

    Attributes:
        rows: Rows of the key tensor.
        users: Query rows that see the keys.
        mask: Additive mask ``[1, 1, E, keys]``, or None.
    """

    rows: slice | Tensor
    users: slice | Tensor
    mask: Tensor | None


def attn_fwd(inputs: AttnInputs, tables: PackedTables, options: AttnOptions) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn` for causal self-attention.

    Args:
        inputs: Queries, keys, values and prefix rows. Keys are ``[N, H, D]``, or an arena ``[arena rows, H, D]`` of any
            float dtype with ``slots``. Prefix rows may have any float dtype; they are cast block by block.
        tables: Tables in which the queries of a segment are its last keys.
        options: Scale, window, soft cap.

    Returns:
        Output ``[N, HQ, D]`` and the natural log-sum-exp ``[N, HQ]``.
    """
    q, k, v, slots = inputs.q, inputs.k, inputs.v, inputs.slots
    sequences = _sequences(tables)
    if slots is not None:
        last = torch.cat([slots[key + keys - rows : key + keys] for _, rows, key, keys in sequences])
        k, v = (t.index_select(0, last).to(q.dtype) for t in (inputs.k, inputs.v))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype), device=q.device)
    # In a bucket, and in a product with a block for several sequences, a sequence's last bits depend on the others.
    # Inference on a CPU promises that they do not.
    by_sequence = q.is_inference() and q.device.type == "cpu"
    if len(sequences) < MIN_SEQUENCES_FOR_BUCKETS or by_sequence:
        _own_fwd((o, lse), Qkv(q, k, v), _runs(sequences), options)
    else:
        padded = Qkv(*(t.index_select(0, tables.gather) for t in (q, k, v)))
        out, stat = torch.empty_like(padded.q), padded.q.new_empty(padded.q.shape[:2], dtype=lse.dtype)
        _own_fwd((out, stat), padded, _buckets(tables), options)
        torch.index_select(out, 0, tables.scatter, out=o)
        torch.index_select(stat, 0, tables.scatter, out=lse)
    if not by_sequence:
        merge_prefix_blocks((o, lse), q, (inputs.prefix_k, inputs.prefix_v), tables.blocks, options)
    elif inputs.prefix_k is not None and inputs.prefix_v is not None:
        source = inputs.prefix_k, inputs.prefix_v
        _merge((o, lse), q, source, _blocks_by_sequence(tables, options.window, q), options)
    if slots is not None:
        _merge((o, lse), q, (inputs.k, inputs.v), _contexts(sequences, slots, options.window, q), options)
    return o, lse


def _own_fwd(
    out: tuple[Tensor, Tensor], qkv: Qkv, batches: Iterable[tuple[slice, int, int]], options: AttnOptions
) -> None:
    """Write the attention of each batch over its own keys to ``out``, output and log-sum-exp."""
    for rows, n, length in batches:
        own = Qkv(*(_batch(t[rows], n) for t in qkv))
        results = sdpa_lse_fwd(own, _window_mask(length, options, qkv.q), options, causal=True)
        for t, result in zip(out, results, strict=True):
            _batch(t[rows], n).copy_(result)


def merge_prefix_blocks(
    out: tuple[Tensor, Tensor],
    q: Tensor,
    prefix: tuple[Tensor | None, Tensor | None],
    tables: BlockTables,
    options: AttnOptions,
) -> None:
    """Merge attention over the prefix blocks into ``out``, in place.

    Args:
        out: Output ``[N, HQ, D]`` and log-sum-exp ``[N, HQ]`` of the attention over the own keys.
        q: Queries ``[N, HQ, D]``.
        prefix: Prefix keys and values ``[rows, H, D]``; None, None without prefixes.
        tables: Prefix blocks and the queries that see them.
        options: Scale, window, soft cap.
    """
    prefix_k, prefix_v = prefix
    if prefix_k is not None and prefix_v is not None:
        _merge(out, q, (prefix_k, prefix_v), _prefix_blocks(tables, options.window, q), options)


def _merge(
    out: tuple[Tensor, Tensor], q: Tensor, source: tuple[Tensor, Tensor], blocks: Iterable[_Block], options: AttnOptions
) -> None:
    o, lse = out
    for block in blocks:
        keys, values = (_as_heads(t[block.rows].to(q.dtype)) for t in source)
        po, pl = sdpa_lse_fwd(Qkv(_as_heads(q[block.users]), keys, values), block.mask, options, causal=False)
        po, pl = po[0].transpose(0, 1), pl[0].T  # [E, HQ, D], [E, HQ]
        own_o, own_l = o[block.users], lse[block.users]
        both = torch.logaddexp(pl, own_l)
        merged = po * (pl - both).exp()[..., None] + own_o * (own_l - both).exp()[..., None]
        o[block.users] = merged.to(o.dtype)
        lse[block.users] = both


def attn_bwd(
    grad: OutputGrad,
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    needs: NeedsGrad,
) -> AttnGrads:
    """Gradients of `attn_fwd` without ``slots``.

    Args:
        grad: Gradient of the output, the output and the log-sum-exp of the forward.
        inputs: Inputs of the forward.
        tables: Tables of the forward.
        options: Options of the forward.
        needs: Gradients to compute.

    Returns:
        Gradients, None where not needed. A block's gradient is the sum over all its users, in the dtype of
        ``prefix_k``.
    """
    q, k, v, prefix_k, prefix_v, _ = inputs
    dq = dk = dv = dpk = dpv = None
    if needs.own:
        dq, dk, dv = _own_bwd(grad, Qkv(q, k, v), tables, options)
    if needs.prefix and prefix_k is not None and prefix_v is not None:
        dpk, dpv = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    if prefix_k is None or prefix_v is None:
        return AttnGrads(dq, dk, dv, dpk, dpv)
    for block in _prefix_blocks(tables.blocks, options.window, q):
        keys, values = (_as_heads(t[block.rows].to(q.dtype)) for t in (prefix_k, prefix_v))
        users = block.users
        block_grad = OutputGrad(_as_heads(grad.do[users]), _as_heads(grad.o[users]), grad.lse[users].T[None])
        gq, gk, gv = sdpa_lse_bwd(block_grad, Qkv(_as_heads(q[users]), keys, values), block.mask, options, causal=False)
        if dq is not None:
            dq[users] += gq[0].transpose(0, 1).to(dq.dtype)
        if dpk is not None and dpv is not None:
            dpk[block.rows] += gk[0].transpose(0, 1).to(dpk.dtype)
            dpv[block.rows] += gv[0].transpose(0, 1).to(dpv.dtype)
    return AttnGrads(dq, dk, dv, dpk, dpv)


def _own_bwd(grad: OutputGrad, qkv: Qkv, tables: PackedTables, options: AttnOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the attention over the own keys."""
    dq, dk, dv = grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in qkv]
    sequences = _sequences(tables)
    if len(sequences) < MIN_SEQUENCES_FOR_BUCKETS:
        _own_bwd_batches(grads, grad, qkv, _runs(sequences), options)
        return dq, dk, dv
    # Padding repeats a real token, so the gradient of its output must be zero.
    padded_do = grad.do.new_zeros(len(tables.gather), *grad.do.shape[1:])
    padded_do.index_copy_(0, tables.scatter.long(), grad.do)
    padded = OutputGrad(padded_do, *(t.index_select(0, tables.gather) for t in grad[1:]))
    padded_qkv = Qkv(*(t.index_select(0, tables.gather) for t in qkv))
    results = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in padded_qkv]
    _own_bwd_batches(results, padded, padded_qkv, _buckets(tables), options)
    for out, source in zip(grads, results, strict=True):
        torch.index_select(source, 0, tables.scatter, out=out)
    return dq, dk, dv


def _own_bwd_batches(
    out: list[Tensor], grad: OutputGrad, qkv: Qkv, batches: Iterable[tuple[slice, int, int]], options: AttnOptions
) -> None:
    """Write dq, dk and dv of each batch to ``out``."""
    for rows, n, length in batches:
        own_grad = OutputGrad(*(_batch(t[rows], n) for t in grad))
        own = Qkv(*(_batch(t[rows], n) for t in qkv))
        results = sdpa_lse_bwd(own_grad, own, _window_mask(length, options, qkv.q), options, causal=True)
        for t, result in zip(out, results, strict=True):
            _batch(t[rows], n).copy_(result)


def _as_heads(t: Tensor) -> Tensor:
    """``[E, H, D]`` -> view ``[1, H, E, D]``."""
    return t.transpose(0, 1)[None]


def _batch(t: Tensor, n: int) -> Tensor:
    """``[n * T, H, ...]`` -> view ``[n, H, T, ...]``."""
    return t.unflatten(0, (n, -1)).transpose(1, 2)


def _sequences(tables: PackedTables) -> list[tuple[int, int, int, int]]:
    """First query row, query rows, first key and keys of each sequence, whose segments follow each other.

    A sequence with an infix has two segments, which start at the same key.
    """
    found = []
    for _, run in itertools.groupby(tables.seg.tolist(), key=lambda seg: seg[2]):
        segs = list(run)
        found.append((segs[0][0], sum(rows for _, rows, _, _ in segs), segs[0][2], segs[-1][3]))
    return found


def _runs(sequences: list[tuple[int, int, int, int]]) -> Iterator[tuple[slice, int, int]]:
    """Rows, number of sequences and length of each run of neighbouring sequences of one length."""
    for length, run in itertools.groupby(sequences, key=lambda sequence: sequence[1]):
        segs = list(run)
        yield slice(segs[0][0], segs[0][0] + len(segs) * length), len(segs), length


def _buckets(tables: PackedTables) -> Iterator[tuple[slice, int, int]]:
    """Place in the padded layout, number of sequences and padded length of each bucket."""
    start = 0
    for n, length in tables.bucket.tolist():
        yield slice(start, start + n * length), n, length
        start += n * length


def _window_mask(length: int, options: AttnOptions, like: Tensor) -> Tensor | None:
    """Additive mask ``[1, 1, T, T]`` of the sliding window, None if the window hides nothing."""
    if not options.window or length <= options.window:
        return None
    pos = torch.arange(length, device=like.device)
    return _additive_mask((pos[:, None] - pos[None] < options.window)[None, None], like)


def _prefix_blocks(tables: BlockTables, window: int, like: Tensor) -> Iterator[_Block]:
    """Prefix blocks with their users and window masks; a query comes to its blocks from left to right."""
    blocks = tables.block.tolist()
    for block, entries, users in _users_in_order(tables):
        start, length = blocks[block]
        mask = None
        if window:  # a row of a sliding block is hidden once it lies `window` or more tokens before the query
            pos = tables.user_pos[entries, None] + torch.arange(length, device=like.device)
            mask = _additive_mask(((pos > -window) | (tables.user_slides[entries, None] == 0))[None, None], like)
        yield _Block(slice(start, start + length), users, mask)


def _users_in_order(tables: BlockTables) -> Iterator[tuple[int, slice | Tensor, slice | Tensor]]:
    """Block, entries of the user tables, and query rows of groups in which no query row occurs twice.

    A block has one group for each place that it takes in compositions. The order of a query's groups is that of its
    composition and does not depend on the numbers of the blocks.
    """
    if len(tables.use) == 0:
        return
    if int(tables.use_indptr.diff().max()) <= 1:
        spans, starts = tables.span.tolist(), tables.user_indptr.tolist()
        for block, ((first, count, consecutive), a) in enumerate(zip(spans, starts[:-1], strict=True)):
            own = slice(a, a + count)
            yield block, own, slice(first, first + count) if consecutive else tables.user[own]
        return
    # The place of an entry is the rank of its position among the entries of its query row.
    key, order = ((tables.user.long() << 32) + tables.user_pos).sort()
    row = key + (1 << 31) >> 32
    place = torch.empty_like(row)
    place[order] = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    num_blocks = len(tables.block)
    block_of = torch.repeat_interleave(tables.user_indptr.diff())
    groups, entries = (place * num_blocks + block_of).sort(stable=True)
    numbers, counts = groups.unique_consecutive(return_counts=True)
    for number, own in zip(numbers.tolist(), entries.split(counts.tolist()), strict=True):
        users = tables.user[own]
        first, last = int(users[0]), int(users[-1])
        is_run = last - first + 1 == len(users)  # users are ascending
        yield number % num_blocks, own, slice(first, last + 1) if is_run else users


def _blocks_by_sequence(tables: PackedTables, window: int, like: Tensor) -> Iterator[_Block]:
    """Prefix blocks of each segment by itself, from left to right."""
    blocks, uses, starts = tables.block.tolist(), tables.use.tolist(), tables.use_indptr.tolist()
    for (row, rows, _, keys), first, last in zip(tables.seg.tolist(), starts[:-1], starts[1:], strict=True):
        for block, position, slides in uses[first:last]:
            start, length = blocks[block]
            mask = None
            if window and slides:
                key_pos = position + torch.arange(length, device=like.device)
                query_pos = torch.arange(keys - rows, keys, device=like.device)
                mask = _additive_mask((key_pos - query_pos[:, None] > -window)[None, None], like)
            yield _Block(slice(start, start + length), slice(row, row + rows), mask)


def _contexts(sequences: list[tuple[int, int, int, int]], slots: Tensor, window: int, like: Tensor) -> Iterator[_Block]:
    """Keys of each sequence before its queries, as blocks of the arena."""
    for row, rows, key, keys in sequences:
        if context := keys - rows:
            mask = None
            if window:
                key_pos = torch.arange(context, device=like.device)
                query_pos = torch.arange(context, keys, device=like.device)
                mask = _additive_mask((key_pos - query_pos[:, None] > -window)[None, None], like)
            yield _Block(slots[key : key + context], slice(row, row + rows), mask)


def _additive_mask(seen: Tensor, like: Tensor) -> Tensor:
    """Mask of 0 where ``seen`` and -inf elsewhere, in the dtype of ``like``."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
