"""`WeightsState`, small networks in the layers of a base model, and what all trained weights have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefixfast.attention.plan import Plan, plain_plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, plain_seq2seq_plan
from prefixfast.config.json_types import JSON
from prefixfast.model.tuned.apply import applied
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.training.batching import MicroBatch
from prefixfast.training.prefix_tensor import PrefixTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob


class WeightsState:
    """Tensors of one name that act in the base model and get gradients there.

    Args:
        data: Group of one name.
        method: Method of the weights.
        tensors: Initial tensors by name, as the method stores them; gradients flow to them.
        options: Options with which the tensors act.
    """

    def __init__(
        self, data: GroupData, method: str, tensors: Mapping[str, Tensor], options: Mapping[str, JSON]
    ) -> None:
        self.model, self.method = data.model, method
        self.tensors, self.options = dict(tensors), dict(options)
        self.params = [PrefixTensor(t) for t in self.tensors.values()]

    def num_trained(self, number: int) -> int:
        """Number of parameters that training adjusts."""
        return sum(t.tensor.numel() for t in self.params)

    def describe(self, numbers: Sequence[int]) -> str:
        """Name of the method."""
        return f"method {self.method}"

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the tensors act in the base model."""
        for t in self.params:
            t.tensor.requires_grad_()
        return applied(self.model, self.method, self.tensors, self.options)

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Discard the gradients of an unfinished step."""
        for t in self.tensors.values():
            t.grad = None

    def backward(self) -> None:
        """Leave the gradients where they are, at the parameters."""

    def plan(self, micro: MicroBatch) -> Plan | Seq2SeqPlan:
        """Attention plan without prefixes."""
        lengths, texts = micro.lengths.tolist(), micro.encoder_lengths
        backend, device = self.model.backend, self.model.device
        if texts is None:
            return plain_plan(lengths, backend=backend, device=device)
        return plain_seq2seq_plan(lengths, texts.tolist(), backend=backend, device=device)

    def current(self) -> list[PrefixTensor]:
        """The tensors."""
        return [PrefixTensor(t.detach()) for t in self.tensors.values()]

    def split(self, flat: Sequence[PrefixTensor], number: int) -> dict[str, Tensor]:
        """The tensors by name, on the CPU."""
        return {name: t.tensor.cpu() for name, t in zip(self.tensors, flat, strict=True)}

    def build(self, tensors: dict[str, Tensor], job: PrefixJob, fields: dict[str, Any]) -> TunedWeights:
        """Make the weights."""
        return TunedWeights(tensors, self.method, self.options, **fields)
