"""Custom operators of packed attention (training and prefill), forward and backward.

Tables cross an operator as a list of int32 tensors in the order of `PackedTables`.
Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixfast.attention import cpu_dense, cpu_packed
from prefixfast.attention.backend_support import packed_unsupported
from prefixfast.attention.backends import select_backend
from prefixfast.attention.operator import operator
from prefixfast_kernels import reference, torch_attn
from prefixfast_kernels.inputs import AttnGrads, AttnInputs, AttnOptions, NeedsGrad, OutputGrad
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.tile_selection import TileSizes


@operator("prefixfast::attn")
def attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    tables: list[Tensor],
    slots: Tensor | None,
    bias: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    square: bool,
    backend: str,
    sizes: list[int],
) -> tuple[Tensor, Tensor]:
    """Packed attention over [prefix blocks; keys], differentiable in q, k, v, prefix_k and prefix_v.

    Args:
        q: Queries ``[N, HQ, D]``, any strides with D contiguous.
        k: Keys ``[M, H, D]``.
        v: Values ``[M, H, D]``.
        prefix_k: Prefix keys ``[sum P, H, D]``, or None. They are cast to the dtype of ``q``; their gradient has their
            own dtype.
        prefix_v: Prefix values ``[sum P, H, D]``, or None.
        tables: `PackedTables`, in order.
        slots: Arena rows of the keys, int32, or None if the keys are rows of ``k`` in order.
        bias: Position bias ``[HQ, 2 * maxd + 1]`` by clamped (key position - query position), or None.
        scale: Factor on the scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Cap of the scores, 0 for none.
        causal: Whether keys after the query are hidden.
        square: Whether the queries of every segment are its last keys (without ``slots``, its keys).
        backend: ``"auto"`` or one of `BACKENDS`.
        sizes: `TileSizes` that the tables were cut into, in order.

    Returns:
        Output ``[N, HQ, D]`` and the natural log-sum-exp ``[N, HQ]`` (fp32, fp64 for fp64).
    """
    inputs = AttnInputs(q, k, v, prefix_k, prefix_v, slots)
    options, packed, tile_sizes = AttnOptions(scale, window, softcap, causal), PackedTables(*tables), TileSizes(*sizes)
    unsupported = packed_unsupported(inputs, options, tile_sizes, has_bias=bias is not None, square=square)
    chosen = select_backend("attn", backend, q.device, unsupported)
    if chosen == "triton":
        from prefixfast_kernels import prefix_fwd  # triton is installed on machines with a GPU only

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return prefix_fwd.attn_fwd(inputs, packed, options, tile_sizes, bias)
    if chosen == "torch" and cpu_packed.is_used(inputs, packed, options, bias):
        return cpu_packed.attn_fwd(inputs, packed, options)
    if chosen == "torch":
        return torch_attn.attn_fwd(inputs, packed, options, bias, cpu_dense.sdpa_lse)
    return reference.attn(inputs, packed, options, bias)


@attn.custom_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))


@torch.library.custom_op("prefixfast::attn_bwd", mutates_args=())
def attn_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    tables: list[Tensor],
    slots: Tensor | None,
    bias: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    square: bool,
    backend: str,
    sizes: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of `attn` from its outputs, on a backend that has kernels for the backward.

    Args:
        do: Gradient of the output ``[N, HQ, D]``.
        q: Queries of the forward ``[N, HQ, D]``.
        k: Keys of the forward ``[M, H, D]``.
        v: Values of the forward ``[M, H, D]``.
        prefix_k: Prefix keys of the forward ``[sum P, H, D]``, or None.
        prefix_v: Prefix values of the forward ``[sum P, H, D]``, or None.
        o: Output of the forward ``[N, HQ, D]``.
        lse: Log-sum-exp of the forward ``[N, HQ]``.
        tables: `PackedTables` of the forward, in order.
        slots: Arena rows of the keys, int32, or None.
        bias: Position bias of the forward ``[HQ, 2 * maxd + 1]``, or None.
        scale: Factor on the scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Cap of the scores, 0 for none.
        causal: Whether keys after the query are hidden.
        square: Whether the queries of every segment are its last keys.
        backend: ``"auto"`` or one of `BACKENDS`.
        sizes: `TileSizes` that the tables were cut into, in order.
        needs: Whether q, k, v, prefix_k and prefix_v need a gradient, in this order.

    Returns:
        dq, dk, dv, dprefix_k, dprefix_v in the dtypes of their tensors; empty where not needed.
    """
    inputs = AttnInputs(q, k, v, prefix_k, prefix_v, slots)
    options, packed, tile_sizes = AttnOptions(scale, window, softcap, causal), PackedTables(*tables), TileSizes(*sizes)
    unsupported = packed_unsupported(
        inputs, options, tile_sizes, has_bias=bias is not None, square=square, backward=True
    )
    chosen = select_backend("attn", backend, q.device, unsupported)
    grad, groups = OutputGrad(do, o, lse), NeedsGrad(own=any(needs[:3]), prefix=any(needs[3:]))
    grads: AttnGrads
    if chosen == "triton":
        from prefixfast_kernels import prefix_bwd  # triton is installed on machines with a GPU only

        with torch.cuda.device_of(q):
            grads = prefix_bwd.attn_bwd(grad, inputs, packed, options, tile_sizes, groups, bias)
    elif cpu_packed.is_used(inputs, packed, options, bias):
        grads = cpu_packed.attn_bwd(grad, inputs, packed, options, groups)
    else:
        grads = torch_attn.attn_bwd(grad, inputs, packed, options, groups, bias)
    return [q.new_empty(0) if g is None or not need else g for g, need in zip(grads, needs, strict=True)]


@attn_bwd.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, *rest: Any
) -> list[Tensor]:
    tensors = zip((q, k, v, prefix_k, prefix_v), rest[-1], strict=True)
    return [
        q.new_empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in tensors
    ]


def _attn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, prefix_k, prefix_v, tables, slots, bias, *numbers = inputs
    ctx.save_for_backward(q, k, v, prefix_k, prefix_v, slots, bias, *output, *tables)
    ctx.numbers = numbers
    ctx.mark_non_differentiable(output[1])


def _attn_backward(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, prefix_k, prefix_v, slots, bias, o, lse, *tables = ctx.saved_tensors
    needs = [bool(n) for n in ctx.needs_input_grad[:5]]
    scale, window, softcap, causal, square, backend, sizes = ctx.numbers
    inputs, options = AttnInputs(q, k, v, prefix_k, prefix_v, slots), AttnOptions(scale, window, softcap, causal)
    unsupported = packed_unsupported(
        inputs, options, TileSizes(*sizes), has_bias=bias is not None, square=square, backward=True
    )
    grads: list[Tensor | None]
    if select_backend("attn", backend, q.device, unsupported) == "reference":
        grads = _reference_grads(do, inputs, PackedTables(*tables), options, bias, needs)
    else:
        made = attn_bwd(do, q, k, v, prefix_k, prefix_v, o, lse, tables, slots, bias, *ctx.numbers, needs)
        grads = [g if need else None for g, need in zip(made, needs, strict=True)]
    return (*grads, [None] * len(tables), *[None] * 9)


def _reference_grads(
    do: Tensor,
    inputs: AttnInputs,
    tables: PackedTables,
    options: AttnOptions,
    bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of q, k, v, prefix_k and prefix_v on the reference backend, None where not needed."""
    # Autograd does not reach into a custom operator, so the forward is repeated here.
    leaves: list[Any] = [
        None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs[:5], needs, strict=True)
    ]
    q, k, v, pk, pv = leaves
    with torch.enable_grad():
        out, _ = reference.attn(AttnInputs(q, k, v, pk, pv, inputs.slots), tables, options, bias)
    wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
    made = iter(torch.autograd.grad(out, wanted, do, allow_unused=True))
    return [next(made) if need else None for need in needs]


attn.custom_op.register_autograd(_attn_backward, setup_context=_attn_setup)
