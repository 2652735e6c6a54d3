"""LayerNorm, RMSNorm, GELU and gated SiLU on CPUs, in Rust. All but LayerNorm are differentiable in their inputs.

The result of a row depends on no other row, to the bit. Tensors are contiguous, of no subclass of torch's, and fp32 or
bf16. Results have the shape and dtype of the first input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixfast import _rust
from prefixfast.attention.cpu_decode import IS_BF16, num_threads


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, path: str | None = None) -> Tensor:
    """LayerNorm of the rows of a tensor, with mean and variance in fp32.

    Args:
        x: CPU tensor ``[..., W]``.
        weight: Factor of each column ``[W]``, in the dtype of ``x`` or in fp32.
        bias: Term of each column ``[W]``, like ``weight``.
        eps: Number that is added to the variance.
        path: Name of the vector instructions, one of ``_rust.attend_paths()``. None takes those of the environment
            variable ``PREFIXFAST_SIMD``, or the fastest.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    parameters = (weight.data_ptr(), bias.data_ptr(), weight.numel(), IS_BF16[weight.dtype])
    where = (x.data_ptr(), out.data_ptr(), x.numel(), IS_BF16[x.dtype])
    _rust.layer_norm(*where, parameters, eps, num_threads(), path)
    return out


def gelu(x: Tensor, *, tanh: bool, path: str | None = None) -> Tensor:
    """GELU of each element. The result is 0 for -inf.

    Args:
        x: CPU tensor.
        tanh: Whether to compute the approximation with the hyperbolic tangent.
        path: Name of the vector instructions, as in `layer_norm`.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _Gelu.apply(x, tanh, path)
    return _gelu(x, tanh, path)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, path: str | None = None) -> Tensor:
    """Rows of a tensor, each divided by the root of its mean square, times a factor per column; computed in fp32.

    Args:
        x: CPU tensor ``[..., W]``.
        weight: Factor of each column ``[W]``, in the dtype of ``x`` or in fp32. It gets no gradient.
        eps: Number that is added to the mean square.
        path: Name of the vector instructions, as in `layer_norm`.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps, path)
    return _rms_norm(x, weight, eps, path)


def gated_silu(gate: Tensor, up: Tensor, *, path: str | None = None) -> Tensor:
    """``silu(gate) * up`` of each element, rounded once.

    Args:
        gate: CPU tensor.
        up: CPU tensor of the same shape and dtype.
        path: Name of the vector instructions, as in `layer_norm`.
    """
    if (gate.requires_grad or up.requires_grad) and torch.is_grad_enabled():
        return _GatedSilu.apply(gate, up, path)
    return _gated_silu(gate, up, path)


def _gelu(x: Tensor, tanh: bool, path: str | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _rust.gelu(x.data_ptr(), out.data_ptr(), x.numel(), IS_BF16[x.dtype], tanh, num_threads(), path)
    return out


def _rms_norm(x: Tensor, weight: Tensor, eps: float, path: str | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    where = (x.data_ptr(), out.data_ptr(), x.numel(), IS_BF16[x.dtype])
    _rust.rms_norm(*where, _row(weight), eps, num_threads(), path)
    return out


def _gated_silu(gate: Tensor, up: Tensor, path: str | None) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype)
    tensors = (gate.data_ptr(), up.data_ptr(), out.data_ptr())
    _rust.gated_silu(tensors, gate.numel(), IS_BF16[gate.dtype], num_threads(), path)
    return out


def _row(weight: Tensor) -> tuple[int, int, bool]:
    return weight.data_ptr(), weight.numel(), IS_BF16[weight.dtype]


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool, path: str | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = (tanh, num_threads(), path)
        return _gelu(x, tanh, path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), dy = ctx.saved_tensors, dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype)
        _rust.gelu_grad((x.data_ptr(), dy.data_ptr(), dx.data_ptr()), x.numel(), IS_BF16[x.dtype], *ctx.how)
        return dx, None, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, path: str | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = (eps, num_threads(), path)
        return _rms_norm(x, weight, eps, path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), dy = ctx.saved_tensors, dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype)
        tensors = (x.data_ptr(), dy.data_ptr(), dx.data_ptr())
        _rust.rms_norm_grad(tensors, x.numel(), IS_BF16[x.dtype], _row(weight), *ctx.how)
        return dx, None, None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, path: str | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.how = (num_threads(), path)
        return _gated_silu(gate, up, path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up), dy = ctx.saved_tensors, dy.contiguous()
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        inputs, outputs = [t.data_ptr() for t in (gate, up, dy)], [dgate.data_ptr(), dup.data_ptr()]
        _rust.gated_silu_grad(inputs, outputs, gate.numel(), IS_BF16[gate.dtype], *ctx.how)
        return dgate, dup, None
