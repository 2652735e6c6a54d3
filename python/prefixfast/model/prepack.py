"""Weights laid out once as a CPU's matrix products like them best, beside the model's own.

Only modules whose type is exactly ``nn.Linear`` or transformers' ``Conv1D`` get an instance ``forward``; parameters, ties, hooks and ``state_dict``
stay as they are. Where gradients are wanted, and after a weight has changed, the module's own forward runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefixfast.model.memory import free_memory

logger = logging.getLogger(__name__)
SHARE = 0.5  # of free memory that copies may take


@dataclass(frozen=True)
class Packed:
    """A model whose weights are packed.

    Attributes:
        nbytes: What the copies take.
        why_not: Why there are none; None if there are.
        undo: Restores the modules.
    """

    nbytes: int
    why_not: str | None
    undo: Callable[[], None]


def prepack(model: nn.Module) -> Packed:
    """Pack the weights of every plain linear layer of a model on a CPU; fp32 and bf16, and where half of the free memory holds the copies."""
    modules: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    nbytes = sum(m.weight.numel() * m.weight.element_size() for m in {id(m.weight): m for m in modules}.values())
    why_not = _why_not(modules) or _no_room(nbytes)
    if why_not is not None:
        logger.info("weights are not packed: %s", why_not)
        return Packed(0, why_not, lambda: None)
    shared: dict[int, Tensor] = {}  # tied weights are packed once
    for module in modules:
        weight = module.weight
        if id(weight) not in shared:
            dense = weight.detach() if type(module) is nn.Linear else weight.detach().t().contiguous()
            shared[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(dense)
        module.__dict__["forward"] = _forward(module, weight, shared[id(weight)])

    def undo() -> None:
        for module in modules:
            module.__dict__.pop("forward", None)

    return Packed(nbytes, None, undo)


def _why_not(modules: list[Any]) -> str | None:
    if not modules:
        return "the model has no plain linear layers"
    weight = modules[0].weight
    if any(m.weight.device.type != "cpu" or m.weight.dtype != weight.dtype for m in modules):
        return "they are not all on the CPU and of one dtype"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {weight.dtype}"
    if any("forward" in m.__dict__ for m in modules):
        return "another program has replaced forwards of this model"
    try:  # private operators: they must be there, take this dtype and compute the same
        x, w, b = (torch.arange(n * 64.0).sin().view(n, 64).to(weight.dtype) for n in (3, 48, 1))
        b = b[0, :48].contiguous()
        got = _linear(x, torch.ops.mkldnn._reorder_linear_weight(w), b)
        torch.testing.assert_close(
            got, F.linear(x, w, b), rtol=2e-2, atol=2e-1 if weight.dtype == torch.bfloat16 else 1e-3
        )
    except (RuntimeError, AttributeError, AssertionError) as e:
        return f"this build of torch cannot: {str(e).splitlines()[0]}"
    return None


def _no_room(nbytes: int) -> str | None:
    free = free_memory(torch.device("cpu"))
    return (
        f"the copies take {nbytes / 2**20:.0f} MiB, more than half of the free {free / 2**20:.0f} MiB"
        if nbytes > SHARE * free
        else None
    )


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _forward(module: Any, weight: Tensor, packed: Tensor) -> Callable[[Tensor], Tensor]:
    own = type(module).forward
    version = weight._version

    def forward(x: Tensor) -> Tensor:
        same = (
            module.weight is weight
            and weight._version == version
            and x.dtype == weight.dtype
            and x.device.type == "cpu"
        )
        if torch.is_grad_enabled() or not same:
            return own(module, x)
        return _linear(x, packed, module.bias)

    return forward
