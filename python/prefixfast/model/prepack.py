"""Copies of weights in the layout of a CPU's matrix products (oneDNN's packed format), beside the model's own weights.

Only modules whose type is exactly ``nn.Linear`` or transformers' ``Conv1D`` get an instance ``forward``. Parameters,
ties, hooks and ``state_dict`` stay as they are. The module's own forward runs where gradients are enabled, and after
the weight has changed.
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
MEMORY_SHARE = 0.5  # largest share of the free memory that the copies take


@dataclass(frozen=True)
class Packed:
    """Result of packing the weights of a model.

    Attributes:
        nbytes: Size of the copies in bytes.
        why_not: Reason why there are no copies, None if there are.
        undo: Function that restores the modules.
    """

    nbytes: int
    why_not: str | None
    undo: Callable[[], None]


def prepack(model: nn.Module) -> Packed:
    """Pack the weights of every plain linear layer of a model on a CPU.

    The weights must be fp32 or bf16, and the copies must fit in half of the free memory. Else nothing is packed.

    Args:
        model: Model with its weights on a CPU.
    """
    modules: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    nbytes = sum(m.weight.numel() * m.weight.element_size() for m in {id(m.weight): m for m in modules}.values())
    why_not = _unsupported(modules) or _lack_of_memory(nbytes)
    if why_not is not None:
        logger.info("weights are not packed: %s", why_not)
        return Packed(0, why_not, lambda: None)
    shared: dict[int, Tensor] = {}  # packed weights by the id of the weight, so that tied weights share one copy
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


def _unsupported(modules: list[Any]) -> str | None:
    """Reason why the weights of these modules cannot be packed, None if they can."""
    if not modules:
        return "the model has no plain linear layers"
    weight = modules[0].weight
    if any(m.weight.device.type != "cpu" or m.weight.dtype != weight.dtype for m in modules):
        return "they are not all on the CPU and of one dtype"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {weight.dtype}"
    if any("forward" in m.__dict__ for m in modules):
        return "another program has replaced forwards of this model"
    try:  # the operators are private to torch, so their presence and their result are checked
        x, w, b = (torch.arange(n * 64.0).sin().view(n, 64).to(weight.dtype) for n in (3, 48, 1))
        b = b[0, :48].contiguous()
        got = _linear(x, torch.ops.mkldnn._reorder_linear_weight(w), b)
        torch.testing.assert_close(
            got, F.linear(x, w, b), rtol=2e-2, atol=2e-1 if weight.dtype == torch.bfloat16 else 1e-3
        )
    except (RuntimeError, AttributeError, AssertionError) as e:
        return f"this build of torch cannot: {str(e).splitlines()[0]}"
    return None


def _lack_of_memory(nbytes: int) -> str | None:
    """Reason why copies of this many bytes do not fit, None if they do."""
    free = free_memory(torch.device("cpu"))
    return (
        f"the copies take {nbytes / 2**20:.0f} MiB, more than half of the free {free / 2**20:.0f} MiB"
        if nbytes > MEMORY_SHARE * free
        else None
    )


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _forward(module: Any, weight: Tensor, packed: Tensor) -> Callable[[Tensor], Tensor]:
    """A forward for a module that uses the packed weight as long as the module's weight is unchanged."""
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
