"""LayerNorm and GELU on CPUs, in Rust, and forwards of modules that use them where an engine runs requests.

The result of a row depends on no other row, to the bit. Parameters are read where they lie at each call, so no change
of them is missed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh

from prefixfast import _rust
from prefixfast.attention.cpu_decode import IS_BF16, num_threads
from prefixfast.model.weights import is_plain_cpu


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, path: str | None = None) -> Tensor:
    """LayerNorm of the rows of a tensor, with mean and variance in fp32.

    Args:
        x: Contiguous CPU tensor ``[..., W]``, fp32 or bf16.
        weight: Factor of each column ``[W]``, contiguous, in the dtype of ``x`` or in fp32.
        bias: Term of each column ``[W]``, like ``weight``.
        eps: Number that is added to the variance.
        path: Name of the vector instructions, one of ``_rust.attend_paths()``. None takes those of the environment
            variable ``PREFIXFAST_SIMD``, or the fastest.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    parameters = (weight.data_ptr(), bias.data_ptr(), weight.numel(), IS_BF16[weight.dtype])
    where = (x.data_ptr(), out.data_ptr(), x.numel(), IS_BF16[x.dtype])
    _rust.layer_norm(*where, parameters, eps, num_threads(), path)
    return out


def gelu(x: Tensor, *, tanh: bool, path: str | None = None) -> Tensor:
    """GELU of each element. The result is 0 for -inf.

    Args:
        x: Contiguous CPU tensor, fp32 or bf16.
        tanh: Whether to compute the approximation with the hyperbolic tangent.
        path: Name of the vector instructions, as in `layer_norm`.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    _rust.gelu(x.data_ptr(), out.data_ptr(), x.numel(), IS_BF16[x.dtype], tanh, num_threads(), path)
    return out


def forward_of(module: Any, in_use: Callable[[], bool]) -> Callable[[Tensor], Tensor] | None:
    """A forward for a module that runs in Rust while ``in_use()`` and no gradients are recorded.

    Args:
        module: Any module.
        in_use: Function that says whether Rust may be used now.

    Returns:
        The forward, None for a module that keeps its own.
    """
    if "forward" in module.__dict__ or not _is_fast():
        return None
    if type(module) is nn.LayerNorm:
        return _layer_norm_forward(module, in_use) if len(module.normalized_shape) == 1 else None
    return None if _tanh(module) is None else _gelu_forward(module, in_use)


@functools.cache
def _is_fast() -> bool:
    """Whether Rust is faster than torch's operators. With narrower vectors it is not measured."""
    return os.environ.get("PREFIXFAST_SIMD", _rust.attend_paths()[0]).startswith("avx512")


def _tanh(module: Any) -> bool | None:
    """Whether a module computes GELU with the hyperbolic tangent, None for another module."""
    if type(module) is nn.GELU:
        return bool(module.approximate == "tanh")
    if type(module) is GELUActivation and module.act is F.gelu:
        return False
    if type(module) is GELUTanh and isinstance(module.act, functools.partial):
        return True
    return None


def _is_plain(x: Tensor) -> bool:
    """Whether Rust reads a tensor where it lies."""
    return x.dtype in IS_BF16 and is_plain_cpu(x)


def _layer_norm_forward(module: nn.LayerNorm, in_use: Callable[[], bool]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if torch.is_grad_enabled() or not in_use() or weight is None or bias is None:
            return nn.LayerNorm.forward(module, x)
        fits = weight.dtype == bias.dtype and weight.dtype in (x.dtype, torch.float32) and weight.shape == bias.shape
        if not (fits and x.shape[-1:] == weight.shape and _is_plain(x) and _is_plain(weight) and _is_plain(bias)):
            return nn.LayerNorm.forward(module, x)
        return layer_norm(x, weight, bias, module.eps)

    return forward


def _gelu_forward(module: Any, in_use: Callable[[], bool]) -> Callable[[Tensor], Tensor]:
    own = type(module).forward

    def forward(x: Tensor) -> Tensor:
        tanh = _tanh(module)
        # In bf16 torch's operator without the hyperbolic tangent is faster.
        is_faster = tanh or (tanh is False and x.dtype == torch.float32)
        if not is_faster or torch.is_grad_enabled() or not in_use() or not _is_plain(x):
            return own(module, x)
        return gelu(x, tanh=bool(tanh))

    return forward
