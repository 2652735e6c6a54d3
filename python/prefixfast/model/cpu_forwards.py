"""Forwards of a model's modules that run in Rust (`cpu_layers`) while an engine runs requests or prefixes are trained.

Outside of these times the modules' own forwards run. Parameters are read where they lie at each call, so no change of
them is missed.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from prefixfast.attention.cpu_decode import IS_BF16
from prefixfast.attention.cpu_dense import is_fast
from prefixfast.model.adapters import adapter_modules
from prefixfast.model.cpu_layers import gated_silu, gelu, layer_norm, rms_norm
from prefixfast.model.weights import is_plain_cpu


class CpuForwards:
    """Forwards in Rust of the modules of a model. Without vector instructions that are fast enough there are none.

    Args:
        model: Model. The layers of PEFT's adapters keep their own forwards.

    Attributes:
        modules: Modules with an instance ``forward``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self._num_requests = self._num_trainings = 0
        self._lock = threading.Lock()
        if not is_fast():
            return
        added = adapter_modules(model)
        for module in model.modules():
            if module not in added and (forward := self._forward_of(module)) is not None:
                module.__dict__["forward"] = forward
                self.modules.append(module)

    def begin(self, *, training: bool = False) -> None:
        """Use the forwards until `end`.

        Args:
            training: Whether they are also used where gradients are recorded.
        """
        self._count(1, training=training)

    def end(self, *, training: bool = False) -> None:
        """Use the modules' own forwards again, as soon as each `begin` had its `end`."""
        self._count(-1, training=training)

    def undo(self) -> None:
        """Restore the modules."""
        for module in self.modules:
            module.__dict__.pop("forward", None)
        self.modules = []

    def _count(self, step: int, *, training: bool) -> None:
        with self._lock:
            if training:
                self._num_trainings += step
            else:
                self._num_requests += step

    def _in_use(self) -> bool:
        return self._num_trainings > 0 or (self._num_requests > 0 and not torch.is_grad_enabled())

    def _forward_of(self, module: Any) -> Callable[[Tensor], Tensor] | None:
        """A forward for a module, None for one that keeps its own."""
        if "forward" in module.__dict__:
            return None
        if type(module) is nn.LayerNorm:
            return self._layer_norm(module) if len(module.normalized_shape) == 1 else None
        if _tanh(module) is not None:
            return self._gelu(module)
        if is_same_code(module, _RmsNorm):
            return self._rms_norm(module)
        return self._gated_mlp(module) if is_same_code(module, _GatedMlp) else None

    def _layer_norm(self, module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight, bias = module.weight, module.bias
            if torch.is_grad_enabled() or not self._in_use() or weight is None or bias is None:
                return nn.LayerNorm.forward(module, x)
            fits = weight.dtype == bias.dtype and weight.shape == bias.shape and _is_plain(bias)
            if not (fits and _is_factor(weight, x)):
                return nn.LayerNorm.forward(module, x)
            return layer_norm(x, weight, bias, module.eps)

        return forward

    def _gelu(self, module: Any) -> Callable[[Tensor], Tensor]:
        own = type(module).forward

        def forward(x: Tensor) -> Tensor:
            tanh = _tanh(module)
            # In bf16 torch's operator without the hyperbolic tangent is faster.
            is_faster = tanh or (tanh is False and x.dtype == torch.float32)
            if not is_faster or not self._in_use() or not _is_plain(x):
                return own(module, x)
            return gelu(x, tanh=bool(tanh))

        return forward

    def _rms_norm(self, module: Any) -> Callable[[Tensor], Tensor]:
        own = type(module).forward

        def forward(x: Tensor) -> Tensor:
            weight = module.weight
            is_trained = weight.requires_grad and torch.is_grad_enabled()
            if is_trained or not self._in_use() or not _is_factor(weight, x) or weight.dtype != x.dtype:
                return own(module, x)
            return rms_norm(x, weight, module.variance_epsilon)

        return forward

    def _gated_mlp(self, module: Any) -> Callable[[Tensor], Tensor]:
        own = type(module).forward

        def forward(x: Tensor) -> Tensor:
            if not self._in_use() or not _is_silu(module.act_fn):
                return own(module, x)
            gate, up = module.gate_proj(x), module.up_proj(x)
            if _is_plain(gate) and _is_plain(up) and gate.dtype == up.dtype and gate.shape == up.shape:
                return module.down_proj(gated_silu(gate, up))
            return module.down_proj(module.act_fn(gate) * up)

        return forward


class _RmsNorm(nn.Module):
    """RMSNorm as in Llama and the models that copy it. `is_same_code` compares its forward with theirs."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _GatedMlp(nn.Module):
    """Feed-forward layer as in Llama and the models that copy it, for the same comparison."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        down_proj: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


def is_same_code(module: nn.Module, example: type[nn.Module]) -> bool:
    """Whether a module's forward has the instructions of that of another class, on the same names and constants.

    Args:
        module: Any module.
        example: Class with the forward that is looked for.
    """
    own = getattr(type(module).forward, "__code__", None)
    if own is None or type(module).forward.__globals__.get("torch", torch) is not torch:
        return False
    return _code_parts(own) == _code_parts(example.forward.__code__)


def _code_parts(code: CodeType) -> tuple[object, ...]:
    """What a function computes, without names of local variables and flags of its file."""
    counts = (code.co_argcount, code.co_kwonlyargcount, code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS))
    return code.co_code, code.co_names, code.co_consts, code.co_freevars, counts


def _tanh(module: Any) -> bool | None:
    """Whether a module computes GELU with the hyperbolic tangent, None for another module."""
    if type(module) is nn.GELU:
        return bool(module.approximate == "tanh")
    if type(module) is GELUActivation and module.act is F.gelu:
        return False
    if type(module) is GELUTanh and isinstance(module.act, functools.partial):
        return True
    return True if type(module) is NewGELUActivation else None


def _is_silu(module: nn.Module) -> bool:
    """Whether a module computes SiLU and does nothing else when it is called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in (nn.SiLU, SiLUActivation) and not any(hooks) and "forward" not in module.__dict__


def _is_plain(x: Tensor) -> bool:
    """Whether Rust reads a tensor where it lies."""
    return x.dtype in IS_BF16 and is_plain_cpu(x)


def _is_factor(weight: Tensor, x: Tensor) -> bool:
    """Whether a tensor has a factor for each column of another one, and Rust reads both where they lie."""
    fits = weight.dtype in (x.dtype, torch.float32) and x.shape[-1:] == weight.shape
    return fits and _is_plain(x) and _is_plain(weight)
