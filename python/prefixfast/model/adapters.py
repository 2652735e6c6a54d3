"""Adapters that PEFT has put into the layers of a base model, and which of them act."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED_VALUES = 256  # values of each tensor of an adapter that its digest covers


@dataclass(frozen=True)
class ActingAdapter:
    """An adapter that changes the output of a layer.

    Attributes:
        layer: Name of the layer's module.
        name: Name of the adapter.
        merged: Whether the adapter is part of the layer's weight.
        scaling: Factor on the adapter's output, None if its kind has none.
    """

    layer: str
    name: str
    merged: bool
    scaling: float | None


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has layers with adapters, acting or not."""
    return next(_layers(model), None) is not None


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Modules of the adapters themselves, which are none of the base model's."""
    parts = (part for _, layer in _layers(model) for part in _parts(layer) if isinstance(part, nn.ModuleDict))
    return {module for part in parts for module in part.modules()}


def acting_adapters(model: nn.Module) -> tuple[ActingAdapter, ...]:
    """Adapters that act in a model now, in the order of its modules."""
    found = []
    for layer, module in _layers(model):
        if module.disable_adapters:  # PEFT takes merged adapters out before the next forward
            continue
        merged = list(getattr(module, "merged_adapters", ()))
        scaling = getattr(module, "scaling", None)
        for name in merged or _names(module.active_adapters):
            own = {key for part in _parts(module) for key in part}
            if name in own:
                factor = scaling.get(name) if isinstance(scaling, dict) else None
                found.append(ActingAdapter(layer, name, bool(merged), None if factor is None else float(factor)))
    return tuple(found)


@torch.no_grad()
def adapters_digest(model: nn.Module) -> str:
    """Hex digest of the adapters that act, by content and not by name; "none" if none acts."""
    acting = acting_adapters(model)
    if not acting:
        return "none"
    digest, modules = hashlib.sha256(), dict(model.named_modules())
    for adapter in acting:
        digest.update(f"{adapter.layer} {adapter.merged} {adapter.scaling}\n".encode())
        for part in _parts(modules[adapter.layer]):
            for tensor in _tensors(part[adapter.name]) if adapter.name in part else ():
                flat = tensor.detach().reshape(-1)
                sampled = flat[:: max(1, len(flat) // SAMPLED_VALUES)].to("cpu", torch.bfloat16)
                digest.update(sampled.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules of PEFT that hold adapters: tuned layers, and copies of whole modules (``modules_to_save``)."""
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters") and _parts(module):
            yield name, module


def _parts(module: Any) -> list[Any]:
    """Containers of a layer that map the name of an adapter to a module or a parameter."""
    names = getattr(module, "adapter_layer_names", ())
    return [part for name in names if isinstance(part := getattr(module, name, None), nn.ModuleDict | nn.ParameterDict)]


def _names(active: str | list[str]) -> list[str]:
    return [active] if isinstance(active, str) else list(active)


def _tensors(part: nn.Module | Tensor) -> list[Tensor]:
    return [part] if isinstance(part, Tensor) else list(part.parameters())
