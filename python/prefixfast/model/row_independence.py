"""Check that a row of a layer's output depends on no other row, so that requests of a batch do not change each other.

A layer that quantizes its input with one scale for the whole tensor fails the check. Quantized weights alone do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LOUDER = 1000.0  # factor on the neighbour's values
LIMIT = 1e-3  # relative difference that is rounding
PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "transformers.pytorch_utils")


@contextlib.contextmanager
def recorded_rows(model: PreTrainedModel) -> Iterator[dict[str, tuple[nn.Module, Tensor]]]:
    """Context manager that records the first row that each unusual layer gets in a forward.

    Unusual layers are those whose class is neither of torch nor of a model of transformers, and those with weights of
    a tensor subclass.

    Yields:
        Layer and row ``[K]`` by the layer's name.
    """
    found: dict[str, tuple[nn.Module, Tensor]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].is_floating_point():
                found.setdefault(name, (module, args[0].detach().flatten(0, -2)[0].clone()))

        return hook

    unusual = [(name, m) for name, m in model.named_modules() if m is not model and not _is_plain(m)]
    hooks = [m.register_forward_pre_hook(record(name), with_kwargs=True) for name, m in unusual]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def dependent_rows(layers: dict[str, tuple[nn.Module, Tensor]]) -> str | None:
    """Reason why a row of a layer depends on its neighbours, None if none does.

    Args:
        layers: Layers with a row of their input, as `recorded_rows` gives them.
    """
    for name, (layer, row) in layers.items():
        alone, loud = (layer(torch.stack([row, row * factor])[None]) for factor in (1.0, LOUDER))
        if not isinstance(alone, Tensor) or alone.shape[:2] != (1, 2):
            continue
        expected, got = alone[0, 0].double(), loud[0, 0].double()
        if not (got - expected).norm() <= LIMIT * expected.norm():
            return (
                f"{name} ({type(layer).__name__}) computes a token's output from other tokens too, as quantization "
                "with one scale for all tokens does, so that requests would change each other; quantize weights alone, "
                "or activations for each token"
            )
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is of a class that computes rows one by one, with weights in plain tensors."""
    weights = module.parameters(recurse=False)
    return type(module).__module__.startswith(PLAIN) and all(type(p.data) is Tensor for p in weights)
