"""Attention of a training step on the CPU in Rust, one call for all sequences with their prefixes, and its gradients.

Shape letters: N packed queries, M keys, R prefix rows, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.cpu_decode import IS_BF16, MAX_HEAD_DIM, num_threads
from prefixfast.attention.cpu_dense import is_fast
from prefixfast_kernels.inputs import AttnGrads, AttnInputs, AttnOptions, NeedsGrad, OutputGrad
from prefixfast_kernels.tables import PackedTables


def is_used(inputs: AttnInputs, tables: PackedTables, options: AttnOptions, bias: Tensor | None) -> bool:
    """Whether `attn_fwd` and `attn_bwd` take such a call, and are faster than torch's operators.

    Args:
        inputs: Queries, keys, values and prefix rows.
        tables: Tables of the step.
        options: Scale, window, soft cap, causality.
        bias: Position bias, or None.
    """
    q, k = inputs.q, inputs.k
    is_plain = q.device.type == "cpu" and q.dtype in IS_BF16 and k.dtype == q.dtype and q.shape[2] <= MAX_HEAD_DIM
    if not is_plain or bias is not None or inputs.slots is not None or options.softcap or not is_fast():
        return False
    # Where no gradient is computed, texts are long, or the bits of a row must not depend on the number of threads.
    return not q.is_inference() and _fits(tables, (len(q), len(k)), options)


def _fits(tables: PackedTables, rows: tuple[int, int], options: AttnOptions) -> bool:
    """Whether the sequences follow each other, no window hides a key, and each thread has a sequence."""
    seg, block = tables.seg.numpy(), tables.block.numpy()
    if not len(seg) or len(seg) < num_threads() or seg[0, 0]:
        return False
    if seg[-1, 0] + seg[-1, 1] != rows[0] or seg[-1, 2] + seg[-1, 3] > rows[1]:
        return False
    ends = seg[:-1, [0, 2]] + seg[:-1, [1, 3]]
    follows = (ends[:, 0] == seg[1:, 0]).all() and (ends[:, 1] <= seg[1:, 2]).all()
    if options.causal and (seg[:, 3] < seg[:, 1]).any():
        return False
    longest = int(seg[:, 3].max()) + int(block[:, 1].sum())
    return bool(follows) and (not options.window or longest <= options.window)


Three = tuple[int, int, int]


class _Call(NamedTuple):
    """First arguments of both functions in Rust, and the tensors that they point to."""

    arguments: tuple[Three, Three, list[tuple[int, int, Three]], bool, list[tuple[int, int]]]
    held: tuple[Tensor, ...]


def attn_fwd(
    inputs: AttnInputs, tables: PackedTables, options: AttnOptions, *, path: str | None = None
) -> tuple[Tensor, Tensor]:
    """Forward of `reference.attn`.

    Args:
        inputs: Queries ``[N, HQ, D]``, keys and values ``[M, H, D]`` and prefix rows ``[R, H, D]``, without ``slots``.
        tables: Tables whose sequences follow each other.
        options: Scale and causality.
        path: Name of the vector instructions, one of ``_rust.attend_paths()``. None takes those of the environment
            variable ``PREFIXFAST_SIMD``, or the fastest.

    Returns:
        Output ``[N, HQ, D]`` and the natural log-sum-exp ``[N, HQ]`` in fp32.
    """
    call = _call(inputs, tables)
    o, lse = torch.empty(inputs.q.shape, dtype=inputs.q.dtype), torch.empty(inputs.q.shape[:2])
    rule = (options.scale, options.causal)
    _rust.attend_packed(*call.arguments, [_whole(o), _whole(lse)], rule, num_threads(), path)
    return o, lse


def attn_bwd(
    grad: OutputGrad,
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    needs: NeedsGrad,
    *,
    path: str | None = None,
) -> AttnGrads:
    """Gradients of `attn_fwd`. They do not depend on the number of threads.

    Args:
        grad: Outputs of the forward and the gradient of the output.
        inputs: Inputs of the forward.
        tables: Tables of the forward.
        options: Options of the forward.
        needs: Gradients to compute.
        path: Name of the vector instructions, as in `attn_fwd`.

    Returns:
        Gradients, None where not needed. A block's gradient is the sum over all its users.
    """
    call, q = _call(inputs, tables), inputs.q
    do, o, lse = _rows(grad.do.to(q.dtype)), _rows(grad.o), grad.lse.contiguous()
    own = [torch.empty(t.shape, dtype=q.dtype) for t in (q, inputs.k, inputs.v)] if needs.own else None
    num_rows = 0 if inputs.prefix_k is None else len(inputs.prefix_k)
    prefix = [torch.zeros(num_rows, *inputs.k.shape[1:]) for _ in range(2)]
    _rust.attend_packed_backward(
        *call.arguments,
        ([_strided(do), _strided(o)], _whole(lse)),
        None if own is None else [_whole(t) for t in own],
        [_whole(t) for t in prefix],
        (options.scale, options.causal),
        num_threads(),
        path,
    )
    dq, dk, dv = own or (None, None, None)
    if inputs.prefix_k is None or inputs.prefix_v is None or not needs.prefix:
        return AttnGrads(dq, dk, dv, None, None)
    dpk, dpv = (t.to(of.dtype) for t, of in zip(prefix, (inputs.prefix_k, inputs.prefix_v), strict=True))
    return AttnGrads(dq, dk, dv, dpk, dpv)


def _call(inputs: AttnInputs, tables: PackedTables) -> _Call:
    """First arguments of a call."""
    q, k, v, prefix_k, prefix_v, _ = inputs
    none = k[:0]
    pk, pv = (none if t is None else t.to(q.dtype) for t in (prefix_k, prefix_v))
    held = tuple(map(_rows, (q, k, v, pk, pv)))
    assert k.shape == v.shape
    assert pk.shape == pv.shape
    assert k.dtype == v.dtype == q.dtype
    heads, rows = (q.shape[1], k.shape[1], q.shape[2]), (len(q), len(k), len(pk))
    numbers = (tables.seg, tables.use_indptr, tables.use, tables.block)
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in numbers)
    places = [_strided(t) for t in held]
    return _Call((heads, rows, places, IS_BF16[q.dtype], [_whole(t) for t in numbers]), (*held, *numbers))


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(2) == 1 else t.contiguous()


def _whole(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.numel()


def _strided(t: Tensor) -> tuple[int, int, Three]:
    """Address, number of elements up to the last one, and strides of sequences, heads and rows."""
    row, head, _ = t.stride()
    span = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    return t.data_ptr(), span, (0, head, row)
