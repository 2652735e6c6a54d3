"""Cross-entropy of a frozen output layer from hidden states, and its gradient, without holding all logits at once.

Rows are processed in chunks. One matrix product gives the logits of a chunk, one pass over the vocabulary gives the
losses, a second pass turns the logits into their gradient in place, and a second product carries the gradient to the
hidden states. A row's loss depends on that row alone, so the gradient of any weighting of the losses is the stored
gradient times the weight, and the backward needs no product.
Shape letters: n target rows, d hidden size, V vocabulary size, C rows of a chunk.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from prefixfast_kernels.inputs import OutputLayer
from prefixfast_kernels.tile_configs import CHIP_INDEPENDENT

# Bytes of the fp32 logits of a chunk: about the last-level cache of a CPU, and enough rows to fill a GPU. A function
# that reads each row a single time from memory takes larger chunks, whose matrix products are faster.
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
LARGE_CHUNK_BYTES = 1 << 26


class RowLosses(Protocol):
    """Function in place of the passes over the vocabulary."""

    def __call__(self, logits: Tensor, targets: Tensor, *, needs_grad: bool) -> Tensor:
        """Losses ``[C]``. With ``needs_grad``, the gradient is written over ``logits [C, V]``."""


def linear_cross_entropy(
    hidden: Tensor,
    layer: OutputLayer,
    targets: Tensor,
    *,
    needs_grad: bool = True,
    backend: str = "torch",
    row_losses: RowLosses | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's target under ``softmax(hidden @ weight.T + bias)``, and its gradient.

    Args:
        hidden: Hidden states ``[n, d]``, fp32, bf16, fp16 or fp64.
        layer: Frozen output layer: weight ``[V, d]`` in the dtype of ``hidden``, bias and soft cap.
        targets: Target tokens ``[n]``, int64, each in ``[0, V)``.
        needs_grad: Whether the gradient is computed.
        backend: ``"triton"`` or ``"torch"``, the implementation of the passes over the vocabulary.
        row_losses: Function in place of these passes, which takes logits in the dtype of ``hidden`` and no soft cap.

    Returns:
        Losses ``[n]`` (fp32, fp64 for fp64) and the gradient of each row's loss by its hidden state ``[n, d]``, empty
        without ``needs_grad``.

    Source:
        Specification: `reference.linear_cross_entropy`.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    targets = targets.contiguous()
    grad = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_grad else hidden.new_empty(0)
    size = CHUNK_BYTES.get(hidden.device.type, 1 << 24) if row_losses is None else LARGE_CHUNK_BYTES
    step = max(1, size // (4 * len(layer.weight)))
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        if row_losses is not None:
            logits = torch.mm(hidden[part], layer.weight.T)
        else:
            logits = _logits(hidden[part], layer.weight)
        if layer.bias is not None:
            logits += layer.bias
        if row_losses is not None:
            losses[part] = row_losses(logits, targets[part], needs_grad=needs_grad)
        else:
            over_vocabulary = _triton_chunk if backend == "triton" else _torch_chunk
            losses[part] = over_vocabulary(logits, targets[part], layer.softcap, needs_grad)
        if needs_grad:
            torch.mm(logits.to(layer.weight.dtype), layer.weight, out=grad[part])
    return losses, grad


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits ``[C, V]`` without the bias, in fp32 (fp64 for fp64)."""
    if hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits = torch.mm(hidden, weight.T)
    return logits if logits.dtype == torch.float64 else logits.float()


def _torch_chunk(logits: Tensor, targets: Tensor, softcap: float, needs_grad: bool) -> Tensor:
    """Losses ``[C]``. With ``needs_grad``, the gradient is written over ``logits [C, V]``."""
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
    """Losses ``[C]``, as `_torch_chunk`, by the Triton kernel."""
    from prefixfast_kernels.softmax_grad import softmax_grad  # triton is not installed everywhere

    config = CHIP_INDEPENDENT["softmax_grad"]
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    softmax_grad[(len(logits),)](
        logits, targets, losses, logits.shape[1], softcap, logits.stride(0),
        BLOCK=config.inner, SOFTCAP=softcap > 0, GRAD=needs_grad, **config.launch_options(),
    )  # fmt: skip
    return losses
