"""Cross-entropy of rows of logits on the CPU, in Rust.

Shape letters: C rows, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.cpu_decode import IS_BF16, num_threads
from prefixfast.attention.cpu_dense import is_fast


def is_used(logits_dtype: torch.dtype, device: torch.device, softcap: float) -> bool:
    """Whether `softmax_loss` takes such logits, and is faster than torch's operators.

    Args:
        logits_dtype: Dtype of the logits.
        device: Their device.
        softcap: Cap of the logits, 0 for none.
    """
    return device.type == "cpu" and logits_dtype in IS_BF16 and not softcap and is_fast()


def softmax_loss(logits: Tensor, targets: Tensor, *, needs_grad: bool, path: str | None = None) -> Tensor:
    """Negative log-likelihood of the target of each row.

    Args:
        logits: Logits ``[C, V]`` on a CPU, contiguous, fp32 or bf16. With ``needs_grad`` the gradient of each row's
            loss takes their place.
        targets: Targets ``[C]``, int64, contiguous.
        needs_grad: Whether the gradient is computed.
        path: Name of the vector instructions, one of ``_rust.attend_paths()``. None takes those of the environment
            variable ``PREFIXFAST_SIMD``, or the fastest.

    Returns:
        Losses ``[C]`` in fp32. That of a row with NaN or +infinity is NaN. The loss of a row depends on no other row,
        to the bit.

    Raises:
        ConfigError: If a target is negative, or not below V.
    """
    assert logits.is_contiguous()
    assert targets.is_contiguous()
    assert (targets.dtype, targets.shape) == (torch.int64, logits.shape[:1])
    losses = torch.zeros(len(logits))
    tensors = (logits.data_ptr(), logits.numel(), IS_BF16[logits.dtype], targets.data_ptr(), losses.data_ptr())
    _rust.softmax_loss(*tensors, len(logits), needs_grad, num_threads(), path)
    return losses
