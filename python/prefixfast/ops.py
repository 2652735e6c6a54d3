"""The custom operators, their gradients and the choice of backend: the only caller of the kernels.

Shape letters: N packed queries, HQ query heads, H kv heads, D head dim, P prefix rows, R decode rows.
Tables cross an operator as a list of int32 tensors in the order of `PackedTables` or `DecodeTables`. Backends: ``torch`` (any device; grouped and merged)
and ``reference`` (the specification, slow). A request that a backend cannot serve goes to ``reference`` and is logged once with the reason.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from prefixfast.errors import ConfigError
from prefixfast_kernels import reference
from prefixfast_kernels.tables import DecodeTables, PackedTables
from prefixfast_kernels.torch_attn import attn_bwd, attn_fwd
from prefixfast_kernels.torch_decode import decode_fwd
from prefixfast_kernels.torch_piece import Options

BACKENDS = ("torch", "reference")
logger = logging.getLogger(__name__)


def choose_backend(name: str) -> str:
    """``"auto"`` or one of `BACKENDS` -> the backend to use.

    Raises:
        ConfigError: For an unknown name.
    """
    if name == "auto":
        return "torch"
    if name not in BACKENDS:
        msg = f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {name!r}"
        raise ConfigError(msg)
    return name


@functools.lru_cache(maxsize=64)
def _log_fallback(op: str, reason: str) -> None:
    logger.warning("%s: falling back to the slow reference backend: %s", op, reason)


def _unsupported(*, causal: bool, slots: Tensor | None, bias: Tensor | None, square: bool) -> str | None:
    """Why the torch backend cannot serve a packed call, or None."""
    reasons = {
        "non-causal attention": not causal,
        "keys in the slot table": slots is not None,
        "a position bias": bias is not None,
        "segments whose queries are not their keys": not square,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


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
        square: Every segment's queries are its keys, from position 0.
        backend: One of `BACKENDS`.

    Returns:
        ``o [N, HQ, D]`` and ``lse [N, HQ]`` (natural log; fp32, fp64 for fp64).
    """
    if backend == "torch":
        if (reason := _unsupported(causal=causal, slots=slots, bias=bias, square=square)) is None:
            return attn_fwd(q, k, v, prefix_k, prefix_v, PackedTables(*tables), Options(scale, window, softcap))
        _log_fallback("attn", reason)
    return reference.attn(
        q, k, v, prefix_k, prefix_v, PackedTables(*tables), scale=scale, window=window, softcap=softcap, causal=causal, slots=slots, bias=bias
    )


@attn.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))


def _attn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, prefix_k, prefix_v, tables, slots, bias, *options = inputs
    ctx.save_for_backward(q, k, v, prefix_k, prefix_v, slots, bias, *output, *tables)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _attn_backward(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, prefix_k, prefix_v, slots, bias, o, lse, *tables = ctx.saved_tensors
    grads = attn_grad(do, q, k, v, prefix_k, prefix_v, o, lse, PackedTables(*tables), slots, bias, ctx.options, ctx.needs_input_grad[:5])
    return (*grads, [None] * len(tables), *[None] * 8)


def attn_grad(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    tables: PackedTables,
    slots: Tensor | None,
    bias: Tensor | None,
    options: list[Any],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients (dq, dk, dv, dprefix_k, dprefix_v) of `attn` from its outputs; None where ``needs`` says so."""
    scale, window, softcap, causal, square, backend = options
    if backend == "torch" and _unsupported(causal=causal, slots=slots, bias=bias, square=square) is None:
        return attn_bwd(
            do,
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            o,
            lse,
            tables,
            Options(scale, window, softcap),
            needs_own=any(needs[:3]),
            needs_prefix=any(needs[3:]),
        )
    leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip((q, k, v, prefix_k, prefix_v), needs, strict=True)]
    own_q, own_k, own_v, own_pk, own_pv = leaves
    assert own_q is not None
    assert own_k is not None
    assert own_v is not None
    with torch.enable_grad():
        out, _ = reference.attn(own_q, own_k, own_v, own_pk, own_pv, tables, scale=scale, window=window, softcap=softcap, causal=causal, slots=slots, bias=bias)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, do, allow_unused=True))
    return tuple(next(grads) if t is not None and t.requires_grad else None for t in leaves)


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
        backend: One of `BACKENDS`.

    Returns:
        ``o [R, HQ, D]`` and ``lse [R, HQ]``.
    """
    step = DecodeTables(*tables)
    if backend == "torch":
        if bias is None:
            pk, pv = (k_arena, v_arena) if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)
            return decode_fwd(q, k_arena, v_arena, pk, pv, table, step, max_len, Options(scale, window, softcap))
        _log_fallback("attn_decode", "a position bias")
    return reference.attn_decode(q, k_arena, v_arena, prefix_k, prefix_v, table, step, scale=scale, window=window, softcap=softcap, bias=bias)


@attn_decode.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))
