"""Custom operator of the cross-entropy of a frozen output layer, differentiable in the hidden states.

Shape letters: n target rows, d hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixfast.attention import cpu_softmax_loss
from prefixfast.attention.backend_support import cross_entropy_unsupported
from prefixfast.attention.backends import select_backend
from prefixfast_kernels import cross_entropy as kernels
from prefixfast_kernels import reference
from prefixfast_kernels.inputs import OutputLayer


@torch.library.custom_op("prefixfast::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, needs_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Losses of targets under ``hidden @ weight.T + bias``, and their gradients by the hidden states.

    Args:
        hidden: Hidden states ``[n, d]``.
        weight: Weight of the output layer ``[V, d]``, in the dtype of ``hidden``.
        bias: Bias of the output layer ``[V]``, or None.
        targets: Target tokens ``[n]``, int64.
        softcap: Cap of the logits, 0 for none.
        needs_grad: Whether the gradient is computed.
        backend: ``"triton"`` or ``"torch"``.

    Returns:
        Losses ``[n]`` (fp32, fp64 for fp64) and gradients ``[n, d]``, empty without ``needs_grad``.
    """
    layer = OutputLayer(weight, bias, softcap)
    # A bias is added to bf16 logits in fp32, which Rust does not do.
    is_rust = backend == "torch" and cpu_softmax_loss.is_used(hidden.dtype, hidden.device, softcap)
    is_rust &= bias is None or hidden.dtype == torch.float32
    row_losses = cpu_softmax_loss.softmax_loss if is_rust else None
    with torch.cuda.device_of(hidden):
        return kernels.linear_cross_entropy(
            hidden, layer, targets, needs_grad=needs_grad, backend=backend, row_losses=row_losses
        )


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, needs_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=reference.accumulator(hidden.dtype))
    if needs_grad:
        return losses, torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return losses, hidden.new_empty(0)


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
    """Loss of every target under a frozen output layer, differentiable in ``hidden``.

    Only the reference backend holds all logits at once.

    Args:
        hidden: Hidden states ``[n, d]``.
        weight: Weight of the output layer ``[V, d]``, in the dtype of ``hidden``.
        bias: Bias of the output layer ``[V]``, or None.
        targets: Target tokens ``[n]``, int64.
        softcap: Cap of the logits, 0 for none.
        backend: ``"auto"`` or one of `BACKENDS`.

    Returns:
        Losses ``[n]`` (fp32, fp64 for fp64).
    """
    unsupported = cross_entropy_unsupported(hidden.dtype)
    chosen = select_backend("cross_entropy", backend, hidden.device, unsupported)
    if chosen == "reference":
        return reference.linear_cross_entropy(hidden, OutputLayer(weight, bias, softcap), targets)
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()
    losses, _ = linear_cross_entropy(hidden, weight, bias, targets, softcap, needs_grad, chosen)
    return losses
