"""`METHODS`, what each method reads and makes, and `Trained`, what the loop needs of a method. It imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from prefixfast.config import MethodConfig, PrefixConfig, TrainConfig
from prefixfast.errors import ConfigError
from prefixfast.prefix.prefix import Prefix

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from prefixfast.attention.plan import Plan
    from prefixfast.training.batching import MicroBatch
    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob

Artifact: TypeAlias = Prefix

PREFIX_OPTIONS = frozenset((*PrefixConfig.names(), "init", "init_text", "on_top_of", "store"))
TRAIN_OPTIONS = frozenset(TrainConfig.names())
# Options of a method without steps: how rows are read and evaluated.
UNTRAINED_OPTIONS = frozenset(
    (
        "recipe",
        "dtype",
        "token_budget",
        "max_length",
        "overflow",
        "eval_fraction",
        "seed",
        "logging_steps",
        "save_steps",
    )
)


@dataclass(frozen=True)
class Method:
    """A method of adaptation.

    Attributes:
        module: Module of ``prefixfast.training.methods`` with the function ``make``.
        reads: Names of the options that the method reads, beside ``method`` itself.
        makes_prefix: Whether the result is a `Prefix`, many of which are trained in one batch. Other results are
            weights, which are trained one after the other.
        is_trained: Whether the method takes optimizer steps.
        learning_rate: Default of the peak learning rate, None for that of prefixes.
    """

    module: str
    reads: frozenset[str]
    makes_prefix: bool = True
    is_trained: bool = True
    learning_rate: float | None = None

    @property
    def is_alone(self) -> bool:
        """Whether each name is a group of its own."""
        return not (self.makes_prefix and self.is_trained)

    def make(self, data: GroupData) -> Trained:
        """Initial state of a group.

        Args:
            data: Group with its rows.
        """
        found: Trained = importlib.import_module(f"prefixfast.training.methods.{self.module}").make(data)
        return found


METHODS: dict[str, Method] = {
    "prefix": Method("prefix", PREFIX_OPTIONS | TRAIN_OPTIONS),
}


class Trained(Protocol):
    """The state that a method trains: n prefixes, or the weights of one name.

    Attributes:
        params: Tensors that the optimizer updates, each with its number of rows of each prefix; weights of one name
            have 1.
    """

    params: list[tuple[Tensor, int]]

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one name."""

    @property
    def description(self) -> str:
        """What is trained, for the log: ``"10 prefix rows"``."""

    def applied(self) -> AbstractContextManager[None]:
        """Context manager in which the base model has what is trained. It gives the base model back unchanged."""

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Bring the parameters into the next forward pass, and discard gradients of an unfinished step.

        Args:
            steps: Number of the step of each name, int64 ``[n]``, which decides its dropout.
            dropout: Whether dropout is applied; evaluation turns it off.
        """

    def backward(self) -> None:
        """Carry gradients to the parameters, once a step after the last micro-batch."""

    def plan(self, micro: MicroBatch) -> Plan:
        """Attention plan of a micro-batch."""

    def current(self) -> list[Tensor]:
        """Tensors of the result, of all names; they can be views of the parameters."""

    def split(self, flat: list[Tensor], number: int) -> dict[str, Tensor]:
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


def method_options(config: MethodConfig) -> dict[str, Any]:
    """The method and the options of it that the method reads."""
    reads = METHODS[config.method].reads
    return {n: getattr(config, n) for n in config.names() if n == "method" or n in reads}


def check_read(method: str, given: Iterable[str], what: str = "") -> None:
    """Raise `ConfigError` for an option that the method does not read.

    Args:
        method: Name of the method.
        given: Names of the options that the caller gave. Names that no method knows are left to other checks.
        what: Name of the argument that holds the options, empty for the arguments of `train`.
    """
    known = PREFIX_OPTIONS | TRAIN_OPTIONS | {*MethodConfig.names()} - {"method"}
    for name in known.difference(METHODS[method].reads).intersection(given):
        readers = [other for other, m in METHODS.items() if name in m.reads]
        where = f"{what}: " if what else ""
        advice = f"it is an option of method {' and '.join(readers)}" if readers else "leave it out"
        msg = f"{where}{name}: method {method!r} does not read it; {advice}"
        raise ConfigError(msg)


def read_preset(method: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe that the method reads."""
    return {name: value for name, value in preset.items() if name in METHODS[method].reads}
