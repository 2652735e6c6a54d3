"""The `torch` backend of packed attention: one call per prefix block and calls for the own keys, merged by log-sum-exp.

A prefix block is read in place, once for all sequences that use it, without a tensor of batch x P. Own keys of few
sequences take one call per run of equal lengths, those of many causal sequences one call per length bucket. A padded
key would be visible without causality, so non-causal attention has no buckets. Inference on a CPU takes one call per
sequence and block, and one per run, so that a sequence has the same bits alone and in any batch.
Specification: `reference.attn`.
Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows, n sequences of a run or
bucket, T queries and S keys of each, E users of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnGrads, AttnInputs, AttnOptions, NeedsGrad, OutputGrad
from prefixfast_kernels.reference import accumulator
from prefixfast_kernels.tables import BlockTables, PackedTables
from prefixfast_kernels.torch_blocks import Block, blocks_by_sequence, contexts, prefix_blocks
from prefixfast_kernels.torch_mask import Mask, run_mask
from prefixfast_kernels.torch_sdpa_lse import Qkv, SdpaLse, sdpa_lse_bwd, sdpa_lse_fwd

# Below this many sequences, one call per run of equal lengths (views, no padding) is faster on CPUs than padded
# buckets.
MIN_SEQUENCES_FOR_BUCKETS = 16


class _Run(NamedTuple):
    """Neighbouring sequences with equally many queries and equally many keys.

    Attributes:
        queries: Query rows.
        keys: Key rows.
        n: Number of sequences.
        shape: Number of queries and number of keys of each sequence.
        first: Position of the first key of a sequence relative to its first query.
    """

    queries: slice
    keys: slice
    n: int
    shape: tuple[int, int]
    first: int = 0


def attn_fwd(
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    bias: Tensor | None = None,
    on_cpu: SdpaLse = sdpa_lse_fwd,
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn`.

    Args:
        inputs: Queries, keys, values and prefix rows. Keys are ``[M, H, D]``, or an arena ``[arena rows, H, D]`` of any
            float dtype with ``slots``. Prefix rows may have any float dtype and are cast block by block.
        tables: Tables in which, for causal attention, the queries of a segment are its last keys.
        options: Scale, window, soft cap, causality. Keys in the slot table are for causal attention.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, without a soft cap, or None.
        on_cpu: Function for rectangular batches on a CPU.

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
    attend = on_cpu if q.device.type == "cpu" else sdpa_lse_fwd
    if _takes_runs(sequences, options) or by_sequence:
        _own_fwd((o, lse), Qkv(q, k, v), _runs(sequences, tables, options), options, bias, attend)
    else:
        padded = Qkv(*(t.index_select(0, tables.gather) for t in (q, k, v)))
        out, stat = torch.empty_like(padded.q), padded.q.new_empty(padded.q.shape[:2], dtype=lse.dtype)
        _own_fwd((out, stat), padded, _buckets(tables), options, bias, attend)
        torch.index_select(out, 0, tables.scatter, out=o)
        torch.index_select(stat, 0, tables.scatter, out=lse)
    if not by_sequence:
        prefix = inputs.prefix_k, inputs.prefix_v
        merge_prefix_blocks((o, lse), q, prefix, tables.blocks, options, bias, attend, batched=True)
    elif inputs.prefix_k is not None and inputs.prefix_v is not None:
        source = inputs.prefix_k, inputs.prefix_v
        _merge((o, lse), q, source, blocks_by_sequence(tables, options.window, bias, q), options, attend)
    if slots is not None:
        blocks = contexts(sequences, slots, options.window, bias, q)
        _merge((o, lse), q, (inputs.k, inputs.v), blocks, options, attend)
    return o, lse


def _own_fwd(
    out: tuple[Tensor, Tensor],
    qkv: Qkv,
    runs: Iterable[_Run],
    options: AttnOptions,
    bias: Tensor | None,
    attend: SdpaLse,
) -> None:
    """Write the attention of each run over its own keys to ``out``, output and log-sum-exp."""
    for run in runs:
        if not run.shape[1]:  # torch's operator divides by the number of keys
            out[0][run.queries], out[1][run.queries] = 0.0, -torch.inf
            continue
        results = attend(_own(qkv, run), _own_mask(run, options, bias, qkv.q), options, causal=options.causal)
        for t, result in zip(out, results, strict=True):
            _batch(t[run.queries], run.n).copy_(result)


def merge_prefix_blocks(
    out: tuple[Tensor, Tensor],
    q: Tensor,
    prefix: tuple[Tensor | None, Tensor | None],
    tables: BlockTables,
    options: AttnOptions,
    bias: Tensor | None = None,
    attend: SdpaLse = sdpa_lse_fwd,
    *,
    batched: bool = False,
) -> None:
    """Merge attention over the prefix blocks into ``out``, in place.

    Args:
        out: Output ``[N, HQ, D]`` and log-sum-exp ``[N, HQ]`` of the attention over the own keys.
        q: Queries ``[N, HQ, D]``.
        prefix: Prefix keys and values ``[rows, H, D]``, or None, None without prefixes.
        tables: Prefix blocks and the queries that see them.
        options: Scale, window, soft cap.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, without a soft cap, or None.
        attend: Function for rectangular batches.
        batched: Whether one call can compute several blocks. The last bits of a query then depend on the others.
    """
    prefix_k, prefix_v = prefix
    if prefix_k is not None and prefix_v is not None:
        blocks = prefix_blocks(tables, options.window, bias, q, batched=batched)
        _merge(out, q, (prefix_k, prefix_v), blocks, options, attend)


def _merge(
    out: tuple[Tensor, Tensor],
    q: Tensor,
    source: tuple[Tensor, Tensor],
    blocks: Iterable[Block],
    options: AttnOptions,
    attend: SdpaLse,
) -> None:
    o, lse = out
    for block in blocks:
        keys, values = (_batch(t[block.rows].to(q.dtype), block.n) for t in source)
        results = attend(Qkv(_batch(q[block.users], block.n), keys, values), block.mask, options, causal=False)
        po, pl = (_unbatch(t, block.real) for t in results)  # [E, HQ, D], [E, HQ]
        users = _real_users(block)
        own_o, own_l = o[users], lse[users]
        both = torch.logaddexp(pl, own_l)
        base = both
        if block.mask is not None and block.mask.blind is not None:  # with no visible key so far, -inf - -inf is NaN
            base = both.clamp(min=torch.finfo(both.dtype).min)
        merged = po * (pl - base).exp()[..., None] + own_o * (own_l - base).exp()[..., None]
        o[users] = merged.to(o.dtype)
        lse[users] = both


def attn_bwd(
    grad: OutputGrad,
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    needs: NeedsGrad,
    bias: Tensor | None = None,
) -> AttnGrads:
    """Gradients of `attn_fwd` without ``slots``.

    Args:
        grad: Gradient of the output, the output and the log-sum-exp of the forward.
        inputs: Inputs of the forward.
        tables: Tables of the forward.
        options: Options of the forward.
        needs: Gradients to compute.
        bias: Position bias of the forward ``[HQ, 2 * maxd + 1]``, or None. It has no gradient.

    Returns:
        Gradients, None where not needed. A block's gradient is the sum over all its users, in the dtype of
        ``prefix_k``.
    """
    q, k, v, prefix_k, prefix_v, _ = inputs
    dq = dk = dv = dpk = dpv = None
    if needs.own:
        dq, dk, dv = _own_bwd(grad, Qkv(q, k, v), tables, options, bias)
    if needs.prefix and prefix_k is not None and prefix_v is not None:
        dpk, dpv = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    if prefix_k is None or prefix_v is None:
        return AttnGrads(dq, dk, dv, dpk, dpv)
    for block in prefix_blocks(tables.blocks, options.window, bias, q, batched=True):
        n, users, real = block.n, block.users, block.real
        keys, values = (_batch(t[block.rows].to(q.dtype), n) for t in (prefix_k, prefix_v))
        do = grad.do[users]
        if real is not None:  # the gradient of padding must be zero
            do = torch.zeros_like(do).index_copy_(0, real, do[real])
        block_grad = OutputGrad(_batch(do, n), _batch(grad.o[users], n), _batch(grad.lse[users], n))
        gq, gk, gv = sdpa_lse_bwd(block_grad, Qkv(_batch(q[users], n), keys, values), block.mask, options, causal=False)
        if dq is not None:
            dq[_real_users(block)] += _unbatch(gq, real).to(dq.dtype)
        if dpk is not None and dpv is not None:
            dpk[block.rows] += _unbatch(gk).to(dpk.dtype)
            dpv[block.rows] += _unbatch(gv).to(dpv.dtype)
    return AttnGrads(dq, dk, dv, dpk, dpv)


def _own_bwd(
    grad: OutputGrad, qkv: Qkv, tables: PackedTables, options: AttnOptions, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the attention over the own keys."""
    sequences = _sequences(tables)
    if _takes_runs(sequences, options):
        make = torch.empty if options.causal else torch.zeros
        dq, dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in qkv)
        _own_bwd_runs((dq, dk, dv), grad, qkv, _runs(sequences, tables, options), options, bias)
        return dq, dk, dv
    # Padding repeats a real token, so the gradient of its output must be zero.
    padded_do = grad.do.new_zeros(len(tables.gather), *grad.do.shape[1:])
    padded_do.index_copy_(0, tables.scatter.long(), grad.do)
    padded = OutputGrad(padded_do, *(t.index_select(0, tables.gather) for t in grad[1:]))
    padded_qkv = Qkv(*(t.index_select(0, tables.gather) for t in qkv))
    results = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in padded_qkv)
    _own_bwd_runs(results, padded, padded_qkv, _buckets(tables), options, bias)
    dq, dk, dv = (t.index_select(0, tables.scatter) for t in results)
    return dq, dk, dv


def _own_bwd_runs(
    out: tuple[Tensor, ...],
    grad: OutputGrad,
    qkv: Qkv,
    runs: Iterable[_Run],
    options: AttnOptions,
    bias: Tensor | None,
) -> None:
    """Write dq, dk and dv of each run to ``out``, which is zero for non-causal attention."""
    for run in runs:
        if not run.shape[1]:
            continue
        own_grad = OutputGrad(*(_batch(t[run.queries], run.n) for t in grad))
        mask = _own_mask(run, options, bias, qkv.q)
        results = sdpa_lse_bwd(own_grad, _own(qkv, run), mask, options, causal=options.causal)
        for t, rows, result in zip(out, (run.queries, run.keys, run.keys), results, strict=True):
            to = _batch(t[rows], run.n)
            # Without causality, the two segments of a sequence with an infix share keys.
            to.copy_(result) if options.causal else to.add_(result)


def _own(qkv: Qkv, run: _Run) -> Qkv:
    """Queries, keys and values of a run."""
    return Qkv(*(_batch(t[rows], run.n) for t, rows in zip(qkv, (run.queries, run.keys, run.keys), strict=True)))


def _own_mask(run: _Run, options: AttnOptions, bias: Tensor | None, like: Tensor) -> Mask | None:
    """Mask of a run's queries over its own keys."""
    hides = options.window and run.shape[0] - run.first > options.window
    return run_mask(run.first, run.shape, options.window if hides else 0, bias, accumulator(like.dtype), like.device)


def _batch(t: Tensor, n: int) -> Tensor:
    """``[n * T, H, ...]`` -> view ``[n, H, T, ...]``."""
    return t.unflatten(0, (n, -1)).transpose(1, 2)


def _unbatch(t: Tensor, real: Tensor | None = None) -> Tensor:
    """``[n, H, T, ...]`` -> ``[n * T, H, ...]``, or some rows of it."""
    rows = t.transpose(1, 2).flatten(0, 1)
    return rows if real is None else rows[real]


def _real_users(block: Block) -> slice | Tensor:
    """Query rows of a block without padding."""
    users = block.users
    return users if isinstance(users, slice) or block.real is None else users[block.real]


def _sequences(tables: PackedTables) -> list[tuple[int, int, int, int]]:
    """First query row, query rows, first key and keys of each sequence, whose segments follow each other.

    A sequence with an infix has two segments, which start at the same key.
    """
    found = []
    for _, run in itertools.groupby(tables.seg.tolist(), key=lambda seg: seg[2]):
        segs = list(run)
        found.append((segs[0][0], sum(rows for _, rows, _, _ in segs), segs[0][2], segs[-1][3]))
    return found


def _takes_runs(sequences: list[tuple[int, int, int, int]], options: AttnOptions) -> bool:
    """Whether own keys take one call per run instead of one per bucket."""
    return len(sequences) < MIN_SEQUENCES_FOR_BUCKETS or not options.causal


def _runs(sequences: list[tuple[int, int, int, int]], tables: PackedTables, options: AttnOptions) -> Iterator[_Run]:
    """Runs of the sequences, or of the segments if the attention is non-causal."""
    if options.causal:
        for length, run in itertools.groupby(sequences, key=lambda sequence: sequence[1]):
            segs = list(run)
            rows = slice(segs[0][0], segs[0][0] + len(segs) * length)
            yield _Run(rows, rows, len(segs), (length, length))
        return
    last: _Run | None = None
    for (row, rows, key, keys), pos in zip(tables.seg.tolist(), tables.seg_pos.tolist(), strict=True):
        own = _Run(slice(row, row + rows), slice(key, key + keys), 1, (rows, keys), -pos)
        if last is not None and last[3:] == own[3:] and (last.queries.stop, last.keys.stop) == (row, key):
            queries, keys_ = slice(last.queries.start, row + rows), slice(last.keys.start, key + keys)
            own = own._replace(queries=queries, keys=keys_, n=last.n + 1)
        elif last is not None:
            yield last
        last = own
    if last is not None:
        yield last


def _buckets(tables: PackedTables) -> Iterator[_Run]:
    """Buckets of the padded layout."""
    start = 0
    for n, length in tables.bucket.tolist():
        rows = slice(start, start + n * length)
        yield _Run(rows, rows, n, (length, length))
        start += n * length
