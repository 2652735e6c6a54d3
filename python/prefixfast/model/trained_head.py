"""Losses under an output layer that is trained: gradients reach its weight, which a tied embedding shares.

Shape letters: n target tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # rows of logits computed at once


class _Losses(torch.autograd.Function):
    """Cross-entropy whose backward pass computes the logits of `ROWS` targets again, so that no more are stored."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.softcap = softcap
        parts = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        return torch.cat([F.cross_entropy(_logits(h, weight, bias, softcap), t, reduction="none") for h, t in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        exact = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device)
        d_bias = None if bias is None else torch.zeros(bias.shape, dtype=exact, device=bias.device)
        d_hidden = []
        parts = zip(hidden.split(ROWS), targets.split(ROWS), grads[0].split(ROWS), strict=True)
        for h, t, scale in parts:
            logits = _logits(h, weight, bias, ctx.softcap)
            d_logits = logits.softmax(-1)
            d_logits[torch.arange(len(t), device=t.device), t] -= 1
            d_logits *= scale[:, None]
            if ctx.softcap:
                d_logits *= 1 - (logits / ctx.softcap).square()
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(h.dtype)
            d_hidden.append(d_logits @ weight)
            d_weight += d_logits.T @ h
        d_bias = None if bias is None or d_bias is None else d_bias.to(bias.dtype)
        return torch.cat(d_hidden), d_weight.to(weight.dtype), d_bias, None, None


def trained_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float) -> Tensor:
    """Negative log-likelihood of target tokens, in nats; differentiable in hidden states, weight and bias.

    Args:
        hidden: Hidden states ``[n, d]``.
        weight: Weight of the output layer ``[V, d]``.
        bias: Bias of the output layer ``[V]``, or None.
        targets: Ids of the target tokens, int64 ``[n]``.
        softcap: Soft cap of the logits, 0 for none.

    Returns:
        Losses ``[n]`` in fp32 (fp64 for hidden states in fp64).
    """
    losses: Tensor = _Losses.apply(hidden, weight, bias, targets, softcap)
    return losses


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """Logits ``[n, V]`` in fp32, or in fp64."""
    out = F.linear(hidden, weight, bias)
    out = out if out.dtype == torch.float64 else out.float()
    return softcap * torch.tanh(out / softcap) if softcap else out
