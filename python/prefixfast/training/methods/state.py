"""`MethodState`, the state of a method as the loop sees it, and `make`, which makes it for a group."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.training.method import METHODS
from prefixfast.training.prefix_tensor import PrefixTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from prefixfast.attention.plan import Plan
    from prefixfast.attention.seq2seq_plan import Seq2SeqPlan
    from prefixfast.training.batching import MicroBatch
    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob

Artifact: TypeAlias = Prefix | TunedWeights


class MethodState(Protocol):
    """The state that a method trains: n prefixes, or the weights of one name.

    Attributes:
        params: Tensors that the optimizer updates, each with the prefixes that have rows in it. Those of weights belong
            to one name.
    """

    params: list[PrefixTensor]

    def num_trained(self, number: int) -> int:
        """Number of parameters that training adjusts for a name with a number."""

    def describe(self, numbers: Sequence[int]) -> str:
        """Description of the parameters of some names for the log: ``"10 prefix rows"``."""

    def applied(self) -> AbstractContextManager[None]:
        """Context manager in which the base model has what is trained. It gives the base model back unchanged.

        No other thread changes the base model meanwhile, and none runs it where its weights are trained. It can be
        entered again.
        """

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Bring the parameters into the next forward pass, and discard gradients of an unfinished step.

        Args:
            steps: Number of the step of each name, int64 ``[n]``, which decides its dropout.
            dropout: Whether dropout is applied; evaluation turns it off.
        """

    def backward(self) -> None:
        """Carry gradients to the parameters, once a step after the last micro-batch."""

    def plan(self, micro: MicroBatch) -> Plan | Seq2SeqPlan:
        """Attention plan of a micro-batch."""

    def current(self) -> list[PrefixTensor]:
        """Tensors of the result, of all names; they can be views of the parameters."""

    def split(self, flat: Sequence[PrefixTensor], number: int) -> dict[str, Tensor]:
        """Tensors of one name by their names in the result, on the CPU; they can be views of ``flat``.

        Args:
            flat: Tensors as `current` gives them.
            number: Number of the name.
        """

    def build(self, tensors: dict[str, Tensor], job: PrefixJob, fields: dict[str, Any]) -> Artifact:
        """Result of one name.

        Args:
            tensors: Tensors as `split` gives them.
            job: Training of the name.
            fields: Attributes ``base``, ``task``, ``decoding`` and ``training``.

        Raises:
            DataError: If a tensor has numbers that are not finite.
        """


def make(data: GroupData) -> MethodState:
    """Initial state of a group.

    Args:
        data: Group with its rows.
    """
    method, guard = METHODS[data.group.method_config.method], data.model.guard
    module = importlib.import_module(f"prefixfast.training.methods.{method.module}")
    # Methods that make weights look into the base model with hooks, flags and layers of their own.
    with guard.changing() if method.makes_weights else guard.running():
        guard.check_unchanged()
        found: MethodState = module.make(data)
    return found
