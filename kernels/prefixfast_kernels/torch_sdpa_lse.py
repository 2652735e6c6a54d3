"""One rectangular piece of attention in torch, forward and backward with given statistics: the unit that the `torch` backend merges.

Shape letters: B batch, HQ query heads, H kv heads, T queries, S keys, D head dim. The flash operator of torch's CPU build returns the log-sum-exp and takes
grouped heads as they are; its backward, called with the output and log-sum-exp of the WHOLE attention, gives this piece's exact gradients (kernels/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast_kernels.reference import accumulator

_flash_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Options:
    """What does not depend on the tables: see `reference.attn`."""

    scale: float
    window: int
    softcap: float


def piece_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one piece.

    Args:
        q: ``[B, HQ, T, D]``, any strides with D contiguous.
        k: ``[B, H, S, D]``.
        v: As ``k``.
        mask: Additive ``[1 or B, 1, T, S]`` of 0 and -inf in the dtype of ``q``, or None.
        options: Scale and soft cap; the window is the mask's business.
        causal: Hide keys after the query (top-left aligned; T == S).

    Returns:
        ``[B, HQ, T, D]`` and the natural log-sum-exp ``[B, HQ, T]``; a query that sees nothing gives 0 and -inf.
    """
    if q.device.type == "cpu" and not options.softcap:
        o, lse = _flash_fwd(q, k, v, 0.0, causal, attn_mask=_per_batch(mask, q), scale=options.scale)
    else:
        scores = _scores(q, k, mask, options, causal=causal)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().to(q.dtype)
        o = torch.matmul(weights, v[:, :, None]).flatten(1, 2)
        lse = lse.flatten(1, 2)
    if mask is not None:  # rows that see nothing: the operators leave NaN there
        blind = mask.isneginf().all(-1)
        o, lse = o.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return o, lse


def piece_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    options: Options,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one piece of an attention whose merged output is ``o`` and merged log-sum-exp ``lse``.

    Args:
        do: ``[B, HQ, T, D]``, gradient of the merged output.
        q: As in `piece_fwd`; so are ``k``, ``v``, ``mask``, ``options`` and ``causal``.
        k: See ``q``.
        v: See ``q``.
        o: Merged output, as ``q``.
        lse: Merged log-sum-exp ``[B, HQ, T]``.
        mask: See ``q``.
        options: See ``q``.
        causal: See ``q``.

    Returns:
        dq ``[B, HQ, T, D]``, dk and dv ``[B, H, S, D]``.
    """
    dtype = accumulator(
        q.dtype
    )  # bf16 runs in fp32: as fast or faster up to 200 keys, and more exact (benches/kernels/attn_backward.py)
    do, q, k, v, o = (t.to(dtype) for t in (do, q, k, v, o))
    if q.device.type == "cpu" and not options.softcap:
        return _flash_bwd(
            do, q, k, v, o, lse.contiguous(), 0.0, causal, attn_mask=_per_batch(mask, q), scale=options.scale
        )
    group = (q.shape[1] // k.shape[1], -1)
    scores = _scores(q, k, mask, options, causal=causal)
    grad, out, stat, query = (t.unflatten(1, group[::-1]) for t in (do, o, lse, q))
    weights = (scores - stat[..., None]).exp()  # [B, H, G, T, S]
    dv = torch.matmul(weights.transpose(-1, -2), grad).sum(2)
    ds = weights * (torch.matmul(grad, v[:, :, None].transpose(-1, -2)) - (grad * out).sum(-1, keepdim=True))
    if options.softcap:
        finite = torch.where(scores.isneginf(), 0.0, scores)
        ds = ds * (1 - (finite / options.softcap) ** 2)
    ds = ds * options.scale
    return torch.matmul(ds, k[:, :, None]).flatten(1, 2), torch.matmul(ds.transpose(-1, -2), query).sum(2), dv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, options: Options, *, causal: bool) -> Tensor:
    """Scores ``[B, H, G, T, S]`` in the accumulator's dtype, -inf where a key is hidden."""
    dtype = accumulator(q.dtype)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    scores = torch.matmul(grouped, k[:, :, None].transpose(-1, -2).to(dtype)) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores + mask[:, :, None]
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _per_batch(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The flash operator wants a mask of the query's dtype with every size but the head's spelt out."""
    return None if mask is None else mask.to(q.dtype).expand(q.shape[0], 1, q.shape[2], mask.shape[-1])
