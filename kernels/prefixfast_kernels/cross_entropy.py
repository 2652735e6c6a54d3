"""Cross-entropy of a frozen output layer, from hidden states: the loss of every row and its gradient, without ever holding all logits.

Rows are taken in chunks: one matrix product gives a chunk's logits, one pass over the vocabulary the loss, a second one turns the logits into their gradient
in place, a second product carries it to the hidden states. A row's loss depends on that row alone, so the gradient of any weighting of the losses is the
stored gradient times the weight: the backward costs nothing. Shape letters: n target rows, d hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast_kernels.tile_configs import EVERYWHERE

CHUNK_BYTES = {
    "cpu": 1 << 24,
    "cuda": 1 << 28,
}  # fp32 logits of a chunk: about the last-level cache of a CPU; enough rows to fill a GPU


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    needs_grad: bool = True,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's target under ``softmax(hidden @ weight.T + bias)``.

    Args:
        hidden: ``[n, d]``, fp32, bf16, fp16 or fp64.
        weight: ``[V, d]`` in the dtype of ``hidden``; frozen.
        bias: ``[V]`` or None; frozen.
        targets: ``[n]`` int64, each in ``[0, V)``.
        softcap: ``softcap * tanh(logit / softcap)``; 0 leaves logits alone.
        needs_grad: Whether the gradient is wanted.
        backend: ``"triton"`` or ``"torch"``: who goes over the vocabulary.

    Returns:
        Losses ``[n]`` (fp32, fp64 for fp64) and the gradient of each row's loss by its hidden state ``[n, d]`` (empty without ``needs_grad``).

    Source:
        `reference.linear_cross_entropy` is the specification.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    targets = targets.contiguous()
    grad = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_grad else hidden.new_empty(0)
    step = max(1, CHUNK_BYTES.get(hidden.device.type, 1 << 24) // (4 * len(weight)))
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        logits = _product(hidden[part], weight)
        if bias is not None:
            logits += bias
        over_vocabulary = _triton_chunk if backend == "triton" else _torch_chunk
        losses[part] = over_vocabulary(logits, targets[part], softcap, needs_grad)
        if needs_grad:
            torch.mm(logits.to(weight.dtype), weight, out=grad[part])
    return losses, grad


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits ``[C, V]`` in fp32 (fp64 for fp64)."""
    if hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits = torch.mm(hidden, weight.T)
    return logits if logits.dtype == torch.float64 else logits.float()


def _torch_chunk(logits: Tensor, targets: Tensor, softcap: float, needs_grad: bool) -> Tensor:
    """Losses ``[C]``; turns ``logits [C, V]`` into their gradient in place if wanted."""
    if softcap:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if needs_grad else logits
        logits.mul_(softcap)
    lse = logits.logsumexp(1)
    picked = logits.gather(1, targets[:, None])[:, 0]
    if needs_grad:
        logits.sub_(lse[:, None]).exp_()
        logits.scatter_add_(1, targets[:, None], torch.full_like(lse, -1)[:, None])
        if softcap:
            logits.mul_(slope)
    return lse - picked


def _triton_chunk(logits: Tensor, targets: Tensor, softcap: float, needs_grad: bool) -> Tensor:
    from prefixfast_kernels.softmax_grad import softmax_grad  # triton is not everywhere

    how = EVERYWHERE["softmax_grad"]
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    softmax_grad[(len(logits),)](
        logits, targets, losses, logits.shape[1], softcap, logits.stride(0),
        BLOCK=how.inner, SOFTCAP=softcap > 0, GRAD=needs_grad, **how.options(),
    )  # fmt: skip
    return losses
