"""Bottleneck adapters after the transformer blocks of a base model.

An adapter is a layer norm, a linear layer to the bottleneck, ReLU, a linear layer back, and a residual connection.

Shape letters: L layers, d hidden size, m width of the bottleneck, N tokens.

Source:
    Lin, Madotto & Fung 2020 (arXiv:2004.03829), class ``Adapter`` of their ``modeling_gpt2.py``. Li & Liang's baseline
    is the same module (``adapter_design`` 1), with weights drawn from a normal distribution of deviation 0.02.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefixfast.errors import ConfigError
from prefixfast.model.base import Model
from prefixfast.model.text_kv import parameter_dtype
from prefixfast.model.tuned.blocks import decoder_blocks, hidden_size

DEVIATION = 0.02  # of the initial weights, GPT-2's initializer_range
EPS = 1e-5  # of the layer norm, GPT-2's


def bottleneck_width(model: Model, share: float) -> int:
    """Width m of the bottleneck with which the adapters have about a share of the base model's parameters.

    Args:
        model: Base model.
        share: Wanted number of parameters of all adapters, as a share of the base model's.

    Returns:
        Width of at least 1.
    """
    d, num_layers = hidden_size(model), len(model.layers)
    of_adapter = share * sum(p.numel() for p in model.hf.parameters()) / num_layers
    return max(1, round((of_adapter - 3 * d) / (2 * d + 1)))


def new_adapters(model: Model, width: int, seed: int) -> dict[str, Tensor]:
    """Initial tensors of the adapters of all layers by name.

    Args:
        model: Base model.
        width: Width m of the bottleneck.
        seed: Random seed.

    Returns:
        For each layer i the tensors ``i.norm.weight`` and ``i.norm.bias`` ``[d]``, ``i.down.weight`` ``[m, d]``,
        ``i.down.bias`` ``[m]``, ``i.up.weight`` ``[d, m]`` and ``i.up.bias`` ``[d]``, in fp32 (fp64 for fp64).
    """
    d, generator = hidden_size(model), torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for i in range(len(model.layers)):
        down, up = (torch.randn(shape, generator=generator) * DEVIATION for shape in ((width, d), (d, width)))
        norm = torch.ones(d), torch.zeros(d)
        tensors |= dict(zip(_names(i), (*norm, down, torch.zeros(width), up, torch.zeros(d)), strict=True))
    return {name: t.to(model.device, parameter_dtype(model.dtype)) for name, t in tensors.items()}


@contextlib.contextmanager
def applied_adapters(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager in which the output of every transformer block passes through its adapter.

    The adapters compute in the dtype of their tensors, to which gradients flow.

    Args:
        model: Base model.
        tensors: Tensors of the adapters by name, as `new_adapters` gives them.

    Raises:
        ConfigError: If the base model has no blocks whose outputs can be changed, or tensors do not fit.
    """
    blocks = decoder_blocks(model)
    _check_shapes(model, tensors)
    hooks: list[RemovableHandle] = []

    def restore() -> None:
        for hook in hooks:
            hook.remove()

    with model.guard.acting_until(restore, tensors.values()):
        for i, block in enumerate(blocks):
            own = [tensors[name] for name in _names(i)]

            def adapted(_: nn.Module, args: object, output: Tensor, own: list[Tensor] = own) -> Tensor:
                return _adapt(output, own)

            hooks.append(block.register_forward_hook(adapted))
        yield


def _adapt(hidden: Tensor, tensors: list[Tensor]) -> Tensor:
    """Hidden states ``[1, N, d]`` after an adapter, in their dtype."""
    norm, shift, down, down_bias, up, up_bias = tensors
    x = hidden.to(norm.dtype)
    inner = F.relu(F.linear(F.layer_norm(x, norm.shape, norm, shift, EPS), down, down_bias))
    return (x + F.linear(inner, up, up_bias)).to(hidden.dtype)


def _names(layer: int) -> list[str]:
    """Names of the tensors of a layer's adapter."""
    return [f"{layer}.{part}.{kind}" for part in ("norm", "down", "up") for kind in ("weight", "bias")]


def _check_shapes(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error if tensors are not those of adapters of one width for a base model."""
    d, num_layers = hidden_size(model), len(model.layers)
    width = tensors["0.down.bias"].numel() if "0.down.bias" in tensors else 0
    shapes = ((d,), (d,), (width, d), (width,), (d, width), (d,))
    expected = {name: shape for i in range(num_layers) for name, shape in zip(_names(i), shapes, strict=True)}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if got != expected or not width:
        wrong = next((n for n in (*expected, *got) if got.get(n) != expected.get(n)), "0.down.bias")
        msg = (
            f"the adapters do not fit this base of {num_layers} layers and hidden size {d}: {wrong} has the shape "
            f"{got.get(wrong)}, expected {expected.get(wrong)}; give the base that they were trained on"
        )
        raise ConfigError(msg)
