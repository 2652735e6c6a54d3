"""Copies of weights in the layout of a CPU's matrix products (oneDNN's packed format), beside the model's own weights.

Only modules whose type is exactly ``nn.Linear`` or transformers' ``Conv1D`` get an instance ``forward``. Parameters,
ties, hooks and ``state_dict`` stay as they are. The copies are used between `Packed.begin` and `Packed.end` only, where
an engine runs requests. `begin` compares the content of all weights with the copies, because a change through
``Parameter.data`` leaves no other trace, and packs changed weights again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefixfast.io.progress import Progress
from prefixfast.model.adapters import adapter_modules
from prefixfast.model.memory import free_memory
from prefixfast.model.weights import content_digests, is_plain_cpu, version

logger = logging.getLogger(__name__)
MEMORY_SHARE = 0.5  # largest share of the free memory that the copies take


@dataclass(frozen=True)
class _Copy:
    """Copy of one weight.

    Attributes:
        weight: Parameter. Tied modules share it.
        values: The parameter's memory, which is held so that no other tensor gets its address.
        version: Version of the parameter when it was packed or compared.
        digest: Digest of the parameter's content.
        packed: Content in the packed layout.
    """

    weight: Tensor
    values: Tensor
    version: int
    digest: int
    packed: Tensor

    def is_current(self, weight: Tensor) -> bool:
        """Whether a module's weight is the one that was packed and has no recorded change since."""
        return (
            weight is self.weight
            and version(weight) == self.version
            and weight.data_ptr() == self.values.data_ptr()
            and weight.dtype == self.values.dtype
        )


@dataclass
class Packed:
    """Result of packing the weights of a model.

    Attributes:
        nbytes: Size of the copies in bytes.
        why_not: Reason why there are no copies, None if there are.
        modules: Linear layers with an instance ``forward``.
        copies: Copy of each weight, by the id of the parameter.
        users: Number of `begin` calls without their `end`.
    """

    nbytes: int
    why_not: str | None
    modules: list[Any] = field(default_factory=list)
    copies: dict[int, _Copy] = field(default_factory=dict)
    users: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Use the copies until `end`, after changed weights were packed again."""
        with self._lock:
            self._refresh()
            self.users += 1

    def end(self) -> None:
        """Use the modules' own forwards again, as soon as each `begin` had its `end`."""
        with self._lock:
            self.users -= 1

    def undo(self) -> None:
        """Restore the modules."""
        for module in self.modules:
            module.__dict__.pop("forward", None)

    def _refresh(self) -> None:
        """Compare the content of all weights, and pack those that have no copy with this content."""
        conv = {id(m.weight): type(m) is Conv1D for m in self.modules}
        weights = {id(m.weight): m.weight for m in self.modules if _is_packable(m.weight)}
        copies, changed = {}, 0
        for (key, weight), digest in zip(weights.items(), content_digests(list(weights.values())), strict=True):
            values, old = weight.detach(), self.copies.get(key)
            if old is not None and old.digest == digest and old.values.shape == values.shape:
                packed = old.packed
            else:
                dense = values.t().contiguous() if conv[key] else values
                packed, changed = torch.ops.mkldnn._reorder_linear_weight(dense), changed + 1
            copies[key] = _Copy(weight, values, version(weight), digest, packed)
        if self.copies and changed:
            logger.info("%d weights have changed since they were packed and are packed again", changed)
        self.copies = copies


def prepack(model: nn.Module) -> Packed:
    """Pack the weights of every plain linear layer of a model on a CPU, without the layers of PEFT's adapters.

    The weights must be fp32 or bf16, and the copies must fit in half of the free memory. Else nothing is packed.

    Args:
        model: Model with its weights on a CPU.
    """
    added = adapter_modules(model)
    modules: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m not in added]
    nbytes = sum(m.weight.numel() * m.weight.element_size() for m in {id(m.weight): m for m in modules}.values())
    why_not = _unsupported(modules) or _lack_of_memory(nbytes)
    if why_not is not None:
        logger.info("weights are not packed: %s", why_not)
        return Packed(0, why_not)
    packed = Packed(nbytes, None, modules)
    with Progress("pack weights"):
        packed._refresh()
    for module in modules:
        module.__dict__["forward"] = _forward(module, packed)
    return packed


def _is_packable(weight: Tensor) -> bool:
    """Whether the operators take a weight."""
    return is_plain_cpu(weight) and weight.dtype in (torch.float32, torch.bfloat16)


def _unsupported(modules: list[Any]) -> str | None:
    """Reason why the weights of these modules cannot be packed, None if they can."""
    if not modules:
        return "the model has no plain linear layers"
    weight = modules[0].weight
    if any(m.weight.device.type != "cpu" or m.weight.dtype != weight.dtype for m in modules):
        return "they are not all on the CPU and of one dtype"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {weight.dtype}"
    if (odd := next((m.weight for m in modules if not _is_packable(m.weight)), None)) is not None:
        return f"some are {type(odd.data).__name__} of strides {odd.stride()}, not plain contiguous tensors"
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


def _forward(module: Any, state: Packed) -> Callable[[Tensor], Tensor]:
    """A forward for a module that uses the copy of its weight while the copies are in use and the copy is current."""
    own = type(module).forward

    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        if not state.users or torch.is_grad_enabled():
            return own(module, x)
        copy = state.copies.get(id(weight))
        if copy is None or not copy.is_current(weight) or x.dtype != weight.dtype or x.device.type != "cpu":
            return own(module, x)
        return _linear(x, copy.packed, module.bias)

    return forward
