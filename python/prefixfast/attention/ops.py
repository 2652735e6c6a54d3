"""The custom operators and their gradients: the only caller of the kernels.

Shape letters: N packed queries, M keys, HQ query heads, H kv heads, D head dim, P prefix rows, R decode rows.
Tables cross an operator as a list of int32 tensors in the order of `PackedTables` or `DecodeTables`. Backends: ``triton`` (GPUs; one fused kernel), ``torch``
(any device; grouped and merged, but decode steps on CPUs run in Rust, `attend.py`) and ``reference`` (the specification, slow). Whatever a backend cannot
serve goes to the next one and is logged once with the reason; a backend that was asked for by the name ``triton`` raises instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixfast.attention import cpu_decode as attend
from prefixfast.attention.backends import BACKENDS as BACKENDS
from prefixfast.attention.backends import Reasons, pick, say
from prefixfast.attention.backends import choose_backend as choose_backend
from prefixfast_kernels import cross_entropy as ce
from prefixfast_kernels import reference, torch_attn
from prefixfast_kernels.tables import DecodeTables, PackedTables
from prefixfast_kernels.tile_configs import Backend as Backend
from prefixfast_kernels.tile_configs import Sizes
from prefixfast_kernels.torch_decode import decode_fwd
from prefixfast_kernels.torch_sdpa_lse import Options


def _packed_reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    bias: Tensor | None,
    *,
    causal: bool,
    square: bool,
    sizes: Sizes,
    backward: bool = False,
) -> Reasons:
    torch_cannot = {
        "non-causal attention": not causal,
        "gradients of keys in the slot table": backward and slots is not None,
        "a position bias": bias is not None,
        "segments whose queries are not their last keys": not square,
    }
    triton_cannot = {
        "a position bias": bias is not None,
        f"{q.dtype}": q.dtype not in (torch.float32, torch.bfloat16, torch.float16),
        "keys of another dtype than the queries": not q.dtype == k.dtype == v.dtype,
        "tables without tiles": not sizes.tokens,
    }
    return {"triton": triton_cannot, "torch": torch_cannot}


def _decode_reasons(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, bias: Tensor | None, *, work: bool
) -> Reasons:
    triton_cannot = {
        "a position bias": bias is not None,
        f"{q.dtype}": q.dtype not in (torch.float32, torch.bfloat16, torch.float16),
        "tables without work": not work,
    }
    reasons = {"triton": triton_cannot, "torch": {"a position bias": bias is not None}}
    if q.device.type == "cpu":
        reasons["attend"] = attend.cannot(q, k, v, pk, pv, bias)
    return reasons


def _cross_entropy_reasons(dtype: torch.dtype) -> Reasons:
    return {"triton": {f"{dtype}": dtype == torch.float64}}


def explain(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Which way each operator of a model goes, and why no faster one."""
    x = torch.empty(1, 1, head_dim, dtype=dtype, device=device)
    found = {
        "attn": _packed_reasons(x, x, x, None, None, causal=True, square=True, sizes=backend.sizes),
        "attn_decode": _decode_reasons(x, x, x, x, x, None, work=backend.decode.users > 0),
        "cross_entropy": _cross_entropy_reasons(dtype),
    }
    return {op: say(backend.name, device, reasons) for op, reasons in found.items()}


@torch.library.custom_op("prefixfast::attn", mutates_args=())
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
    """Packed attention over [prefix blocks; keys]; differentiable in q, k, v, prefix_k and prefix_v.

    Args:
        q: ``[N, HQ, D]``, any strides with D contiguous.
        k: ``[M, H, D]``.
        v: As ``k``.
        prefix_k: ``[sum P, H, D]`` or None; cast to the dtype of ``q`` inside, its gradient comes back in its own dtype.
        prefix_v: As ``prefix_k``.
        tables: `PackedTables`, in order.
        slots: Arena rows of the keys, or None: keys are rows of ``k``.
        bias: ``[HQ, 2 * maxd + 1]`` by clamped (key - query) position, or None.
        scale: Multiplies scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Score cap, 0 for none.
        causal: Hide keys after the query.
        square: Every segment's queries are its last keys (without ``slots`` its keys).
        backend: ``"auto"`` or one of `BACKENDS`.
        sizes: `Sizes`, in order: what the tables' tiles were cut into.

    Returns:
        ``o [N, HQ, D]`` and ``lse [N, HQ]`` (natural log; fp32, fp64 for fp64).
    """
    cut = Sizes(*sizes)
    chosen = pick(
        "attn", backend, q.device, _packed_reasons(q, k, v, slots, bias, causal=causal, square=square, sizes=cut)
    )
    packed, options = PackedTables(*tables), Options(scale, window, softcap)
    if chosen == "triton":
        from prefixfast_kernels import prefix_fwd  # triton is there on GPUs only

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return prefix_fwd.attn_fwd(q, k, v, prefix_k, prefix_v, packed, options, cut, causal=causal, slots=slots)
    if chosen == "torch":
        return torch_attn.attn_fwd(q, k, v, prefix_k, prefix_v, packed, options, slots=slots)
    return reference.attn(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        packed,
        scale=scale,
        window=window,
        softcap=softcap,
        causal=causal,
        slots=slots,
        bias=bias,
    )


@attn.register_fake
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
    """Gradients of `attn` from its outputs on a backend that has kernels for it.

    Args:
        do: Gradient of ``o`` ``[N, HQ, D]``.
        q: As in `attn`; so are all but the following.
        k: See ``q``.
        v: See ``q``.
        prefix_k: See ``q``.
        prefix_v: See ``q``.
        o: Output of `attn`.
        lse: Log-sum-exp of `attn`.
        tables: See ``q``.
        slots: See ``q``.
        bias: See ``q``.
        scale: See ``q``.
        window: See ``q``.
        softcap: See ``q``.
        causal: See ``q``.
        square: See ``q``.
        backend: See ``q``.
        sizes: See ``q``.
        needs: Which of q, k, v, prefix_k, prefix_v need a gradient.

    Returns:
        dq, dk, dv, dprefix_k, dprefix_v in the dtypes of their tensors; empty where not needed.
    """
    cut, packed, options = Sizes(*sizes), PackedTables(*tables), Options(scale, window, softcap)
    chosen = pick(
        "attn",
        backend,
        q.device,
        _packed_reasons(q, k, v, slots, bias, causal=causal, square=square, sizes=cut, backward=True),
    )
    wants = {"needs_own": any(needs[:3]), "needs_prefix": any(needs[3:])}
    grads: tuple[Tensor | None, ...]
    if chosen == "triton":
        from prefixfast_kernels import prefix_bwd  # triton is there on GPUs only

        with torch.cuda.device_of(q):
            grads = prefix_bwd.attn_bwd(
                do, q, k, v, prefix_k, prefix_v, o, lse, packed, options, cut, causal=causal, slots=slots, **wants
            )
    else:
        grads = torch_attn.attn_bwd(do, q, k, v, prefix_k, prefix_v, o, lse, packed, options, **wants)
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
    q, k, v, prefix_k, prefix_v, tables, slots, bias, *options = inputs
    ctx.save_for_backward(q, k, v, prefix_k, prefix_v, slots, bias, *output, *tables)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _attn_backward(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, prefix_k, prefix_v, slots, bias, o, lse, *tables = ctx.saved_tensors
    needs = [bool(n) for n in ctx.needs_input_grad[:5]]
    scale, window, softcap, causal, square, backend, sizes = ctx.options
    chosen = pick(
        "attn",
        backend,
        q.device,
        _packed_reasons(q, k, v, slots, bias, causal=causal, square=square, sizes=Sizes(*sizes), backward=True),
    )
    if chosen == "reference":  # by autograd, which does not reach into operators
        same: dict[str, Any] = {
            "scale": scale,
            "window": window,
            "softcap": softcap,
            "causal": causal,
            "slots": slots,
            "bias": bias,
        }
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((q, k, v, prefix_k, prefix_v), needs, strict=True)
        ]
        with torch.enable_grad():
            own_q, own_k, own_v, own_pk, own_pv = leaves
            out, _ = reference.attn(own_q, own_k, own_v, own_pk, own_pv, PackedTables(*tables), **same)
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
        made = iter(torch.autograd.grad(out, wanted, do, allow_unused=True))
        grads = [next(made) if need else None for need in needs]
    else:
        grads = attn_bwd(do, q, k, v, prefix_k, prefix_v, o, lse, tables, slots, bias, *ctx.options, needs)
    given = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*given, [None] * len(tables), *[None] * 9)


attn.register_autograd(_attn_backward, setup_context=_attn_setup)


@torch.library.custom_op("prefixfast::kv_write", mutates_args=("k_arena", "v_arena"))
def kv_write(k_arena: Tensor, v_arena: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write new keys and values ``[N, H, D]`` to rows ``slots`` int32 ``[N]`` of the arenas, in place."""
    index = slots.long()
    k_arena.index_copy_(0, index, k.to(k_arena.dtype))
    v_arena.index_copy_(0, index, v.to(v_arena.dtype))


@kv_write.register_fake
def _(k_arena: Tensor, v_arena: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    return None


@torch.library.custom_op("prefixfast::attn_decode", mutates_args=())
def attn_decode(
    q: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    table: Tensor,
    tables: list[Tensor],
    bias: Tensor | None,
    max_len: int,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
    users: int,
) -> tuple[Tensor, Tensor]:
    """One query a row over its prefix blocks and its slots; no gradient.

    Args:
        q: ``[R, HQ, D]``.
        k_arena: ``[arena rows, H, D]``.
        v_arena: As ``k_arena``.
        prefix_k: A second place of prefix rows, or None: they are rows of ``k_arena``.
        prefix_v: As ``prefix_k``.
        table: ``[rows, Tmax]`` int32: arena row of each token.
        tables: `DecodeTables`, in order.
        bias: As in `attn`.
        max_len: Longest row of the step.
        scale: Multiplies scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Score cap, 0 for none.
        backend: ``"auto"`` or one of `BACKENDS`.
        users: `DecodeSizes.users` that the tables' work was cut into, 0 for tables without.

    Returns:
        ``o [R, HQ, D]`` and ``lse [R, HQ]``.
    """
    step, options = DecodeTables(*tables), Options(scale, window, softcap)
    pk, pv = (k_arena, v_arena) if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)
    reasons = _decode_reasons(q, k_arena, v_arena, pk, pv, bias, work=bool(users) and len(step.work) > 0)
    chosen = pick("attn_decode", backend, q.device, reasons)
    if chosen == "triton":
        from prefixfast_kernels import prefix_decode  # triton is there on GPUs only

        with torch.cuda.device_of(q):
            return prefix_decode.attn_decode(q, k_arena, v_arena, prefix_k, prefix_v, table, step, users, options)
    if chosen == "attend":
        return attend.decode(q, k_arena, v_arena, pk, pv, table, step, options)
    if chosen == "torch":
        return decode_fwd(q, k_arena, v_arena, pk, pv, table, step, max_len, options)
    return reference.attn_decode(
        q, k_arena, v_arena, prefix_k, prefix_v, table, step, scale=scale, window=window, softcap=softcap, bias=bias
    )


@attn_decode.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))


@torch.library.custom_op("prefixfast::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, needs_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Losses ``[n]`` of ``targets`` int64 ``[n]`` under ``hidden [n, d] @ weight [V, d].T + bias`` and their gradients ``[n, d]``; see `cross_entropy`."""
    how = {"softcap": softcap, "needs_grad": needs_grad, "backend": backend}
    with torch.cuda.device_of(hidden):
        return ce.linear_cross_entropy(hidden, weight, bias, targets, **how)  # type: ignore[arg-type]


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, needs_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=reference.accumulator(hidden.dtype))
    return losses, torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad else hidden.new_empty(
        0
    )


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _cross_entropy_backward(ctx: Any, dlosses: Tensor, _dgrad: Tensor) -> tuple[Any, ...]:
    (grad,) = ctx.saved_tensors
    return (grad * dlosses[:, None].to(grad.dtype), *[None] * 6)


linear_cross_entropy.register_autograd(_cross_entropy_backward, setup_context=_cross_entropy_setup)


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, backend: str
) -> Tensor:
    """Loss of every target under a frozen output layer, differentiable in ``hidden``; never holds all logits but on the reference backend.

    Args:
        hidden: ``[n, d]``.
        weight: ``[V, d]`` in the dtype of ``hidden``.
        bias: ``[V]`` or None.
        targets: ``[n]`` int64.
        softcap: Cap of the logits, 0 for none.
        backend: ``"auto"`` or one of `BACKENDS`.

    Returns:
        ``[n]``, fp32 (fp64 for fp64).
    """
    chosen = pick("cross_entropy", backend, hidden.device, _cross_entropy_reasons(hidden.dtype))
    if chosen == "reference":
        return reference.linear_cross_entropy(hidden, weight, bias, targets, softcap=softcap)
    losses, _ = linear_cross_entropy(
        hidden, weight, bias, targets, softcap, hidden.requires_grad and torch.is_grad_enabled(), chosen
    )
    return losses
