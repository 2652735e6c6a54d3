"""Attention of rectangular batches in torch with the log-sum-exp, forward and backward.

The `torch` backend merges several such calls by log-sum-exp. The flash operator of torch's CPU build returns the
log-sum-exp and takes grouped heads as they are. Its backward, called with the output and log-sum-exp of the WHOLE
attention, gives the exact gradients of one part (kernels/README.md).
Shape letters: B batch, HQ query heads, H kv heads, G queries per kv head, T queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prefixfast_kernels.inputs import AttnOptions, OutputGrad
from prefixfast_kernels.reference import accumulator
from prefixfast_kernels.torch_mask import Mask

_flash_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Qkv(NamedTuple):
    """Tensors of one rectangular attention.

    Attributes:
        q: Queries ``[B, HQ, T, D]``, any strides with D contiguous.
        k: Keys ``[B, H, S, D]``.
        v: Values ``[B, H, S, D]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class SdpaLse(Protocol):
    """Function with the arguments and the result of `sdpa_lse_fwd`."""

    def __call__(self, qkv: Qkv, mask: Mask | None, options: AttnOptions, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Attention of one rectangular batch, as `sdpa_lse_fwd` describes it."""


def sdpa_lse_fwd(qkv: Qkv, mask: Mask | None, options: AttnOptions, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of one rectangular batch.

    Args:
        qkv: Queries, keys and values.
        mask: Mask of the queries over the keys, or None. It includes the sliding window and the position bias.
        options: Scale and soft cap. Window and causality of the options are ignored.
        causal: Whether keys after the query are hidden (top-left aligned, T == S).

    Returns:
        Output ``[B, HQ, T, D]`` and the natural log-sum-exp ``[B, HQ, T]``. A query without visible keys gives 0 and
        -inf.
    """
    q, k, v = qkv
    if q.device.type == "cpu" and not options.softcap:
        o, lse = _flash_fwd(q, k, v, 0.0, causal, attn_mask=_flash_mask(mask, q), scale=options.scale)
    else:
        scores = _scores(q, k, mask, options, causal=causal)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().to(q.dtype)
        o = torch.matmul(weights, v[:, :, None]).flatten(1, 2)
        lse = lse.flatten(1, 2)
    if mask is not None and mask.blind is not None:  # the operators leave NaN in rows without visible keys
        o, lse = o.masked_fill(mask.blind[..., None], 0.0), lse.masked_fill(mask.blind, -torch.inf)
    return o, lse


def sdpa_lse_bwd(
    grad: OutputGrad, qkv: Qkv, mask: Mask | None, options: AttnOptions, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part of a merged attention.

    Args:
        grad: Gradient of the merged output ``[B, HQ, T, D]``, the merged output, and the merged log-sum-exp
            ``[B, HQ, T]``.
        qkv: Queries, keys and values of the part.
        mask: Mask of the forward, or None.
        options: Scale and soft cap. Window and causality of the options are ignored.
        causal: Whether keys after the query are hidden (top-left aligned, T == S).

    Returns:
        dq ``[B, HQ, T, D]``, dk and dv ``[B, H, S, D]``.
    """
    # bf16 runs in fp32: as fast or faster up to 200 keys, and more exact (benches/kernels/attn_backward.py).
    dtype = accumulator(qkv.q.dtype)
    do, q, k, v, o = (t.to(dtype) for t in (grad.do, *qkv, grad.o))
    lse = grad.lse
    if q.device.type == "cpu" and not options.softcap:
        return _flash_bwd(
            do, q, k, v, o, lse.contiguous(), 0.0, causal, attn_mask=_flash_mask(mask, q), scale=options.scale
        )
    heads = (-1, q.shape[1] // k.shape[1])
    scores = _scores(q, k, mask, options, causal=causal)
    grouped_do, grouped_o, grouped_lse, grouped_q = (t.unflatten(1, heads) for t in (do, o, lse, q))
    weights = (scores - grouped_lse[..., None]).exp()  # [B, H, G, T, S]
    dv = torch.matmul(weights.transpose(-1, -2), grouped_do).sum(2)
    delta = (grouped_do * grouped_o).sum(-1, keepdim=True)
    ds = weights * (torch.matmul(grouped_do, v[:, :, None].transpose(-1, -2)) - delta)
    if options.softcap:
        finite = torch.where(scores.isneginf(), 0.0, scores)
        ds = ds * (1 - (finite / options.softcap) ** 2)
    ds = ds * options.scale
    return torch.matmul(ds, k[:, :, None]).flatten(1, 2), torch.matmul(ds.transpose(-1, -2), grouped_q).sum(2), dv


def _scores(q: Tensor, k: Tensor, mask: Mask | None, options: AttnOptions, *, causal: bool) -> Tensor:
    """Scores ``[B, H, G, T, S]`` in the accumulator's dtype, -inf where a key is hidden.

    The derivative of a soft cap needs scores without a position bias, so no call has both.
    """
    dtype = accumulator(q.dtype)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    scores = torch.matmul(grouped, k[:, :, None].transpose(-1, -2).to(dtype)) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores + mask.added.expand(-1, q.shape[1], -1, -1).unflatten(1, scores.shape[1:3])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _flash_mask(mask: Mask | None, q: Tensor) -> Tensor | None:
    """Mask as the flash operator takes it, with every size expanded."""
    return None if mask is None else mask.added.expand(*q.shape[:3], -1)
