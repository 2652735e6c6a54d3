"""Methods ``full`` and ``top2``: weights of the base model itself.

The optimizer updates masters of the weights, in fp32, or in fp64 for a base model in fp64. While the base model is
trained its parameters point at the masters, or in 16 bits at rounded copies of them. Its own memory is not written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from prefixfast.model.text_kv import parameter_dtype
from prefixfast.model.tuned.apply import applied
from prefixfast.model.tuned.full import TOP_BLOCKS, all_weights, top_weights
from prefixfast.training.methods.weights import WeightsState
from prefixfast.training.prefix_tensor import PrefixTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from prefixfast.training.group_data import GroupData


class BaseState(WeightsState):
    """Weights of the base model.

    Args:
        data: Group of one name.
        weights: Parameters of the base model that are trained, by name.
    """

    def __init__(self, data: GroupData, weights: dict[str, nn.Parameter]) -> None:
        dtype = parameter_dtype(data.model.dtype)
        masters = {name: p.detach().to(dtype, copy=True) for name, p in weights.items()}
        super().__init__(data, data.group.method_config.method, masters, {})
        self.weights = weights
        self.dtypes = {name: p.dtype for name, p in weights.items()}
        # The optimizer takes tensors of at least one dimension; these share the memory of the masters.
        self.params = [PrefixTensor(t.view(-1) if t.ndim == 0 else t) for t in masters.values()]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the base model has the masters, or rounded copies, and gets gradients."""
        hooks = []
        with applied(self.model, self.method, self.tensors, self.options):
            for p, master in zip(self.weights.values(), self.params, strict=True):
                p.requires_grad_(True)
                hooks.append(p.register_post_accumulate_grad_hook(_carried_to(master.tensor)))
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    @torch.no_grad()
    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Bring the masters into the base model, and discard the gradients of an unfinished step."""
        masters = (t.tensor for t in self.params)
        for p, master in zip(self.weights.values(), masters, strict=True):
            master.grad = p.grad = None
            if p.dtype != master.dtype:
                p.copy_(master.view(p.shape))

    def current(self) -> list[PrefixTensor]:
        """The weights in the base model's dtype, in which they are evaluated and stored."""
        dtypes = self.dtypes.values()
        return [PrefixTensor(t.tensor.to(dtype)) for t, dtype in zip(self.params, dtypes, strict=True)]

    def split(self, flat: Sequence[PrefixTensor], number: int) -> dict[str, Tensor]:
        """The weights by name, on the CPU."""
        shaped = zip(self.tensors, flat, self.weights.values(), strict=True)
        return {name: t.tensor.view(p.shape).cpu() for name, t, p in shaped}


def _carried_to(master: Tensor) -> Callable[[Tensor], None]:
    """Hook that adds the gradient of a micro-batch to that of a master, in the master's dtype."""

    def carry(p: Tensor) -> None:
        assert p.grad is not None
        grad = p.grad.to(master.dtype).view(master.shape)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None

    return carry


def make(data: GroupData) -> BaseState:
    """Weights of the base model that a method trains."""
    is_full = data.group.method_config.method == "full"
    return BaseState(data, all_weights(data.model) if is_full else top_weights(data.model, TOP_BLOCKS))
