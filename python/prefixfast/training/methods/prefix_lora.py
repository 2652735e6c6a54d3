"""Method ``prefix+lora``: a prefix and low-rank updates of linear layers, trained in the same steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefixfast.attention.plan import Plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan
from prefixfast.model.fingerprint import fingerprint
from prefixfast.model.tuned.apply import applied
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.training.batching import MicroBatch
from prefixfast.training.method import METHODS
from prefixfast.training.methods import prefix
from prefixfast.training.methods.lora import initial_lora
from prefixfast.training.methods.prefix import PrefixState
from prefixfast.training.methods.weights import WeightsState
from prefixfast.training.prefix_tensor import PrefixTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from prefixfast.model.fingerprint import Fingerprint
    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob

PREFIX = "prefix."  # start of the names of the prefix's tensors


class PrefixLoraState:
    """Keys and values of one prefix, and the LoRA layers that act with it.

    Args:
        rows: The prefix.
        lora: The LoRA layers.
        rate: Learning rate of the LoRA layers as a factor on that of the prefix, 0 for layers that are not trained.
    """

    def __init__(self, rows: PrefixState, lora: WeightsState, rate: float) -> None:
        if not rate:
            lora.params = []
            for t in lora.tensors.values():
                t.requires_grad_(False)
        self.rows, self.lora = rows, lora
        self.params = rows.params + [t._replace(rate=rate) for t in lora.params]

    def num_trained(self, number: int) -> int:
        """Number of parameters that training adjusts."""
        return self.rows.num_trained(number) + self.lora.num_trained(number)

    def describe(self, numbers: Sequence[int]) -> str:
        """Number of prefix rows and rank of the LoRA layers."""
        return f"{self.rows.describe(numbers)} with LoRA of rank {self.lora.options['r']}"

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the LoRA layers act in the base model."""
        return self.lora.applied()

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the keys and values of the next forward pass, and discard the gradients of an unfinished step."""
        self.rows.refresh(steps, dropout=dropout)
        self.lora.refresh(steps, dropout=dropout)

    def backward(self) -> None:
        """Carry the gradients of the keys and values to the parameters."""
        self.rows.backward()

    def plan(self, micro: MicroBatch) -> Plan | Seq2SeqPlan:
        """Attention plan in which each sequence sees the prefix."""
        return self.rows.plan(micro)

    def current(self) -> list[PrefixTensor]:
        """Keys and values, and behind them the tensors of the LoRA layers."""
        return self.rows.current() + self.lora.current()

    def split(self, flat: Sequence[PrefixTensor], number: int) -> dict[str, Tensor]:
        """Tensors by name, those of the prefix with the start `PREFIX`."""
        count = len(flat) - len(self.lora.tensors)
        own = self.rows.split(flat[:count], number)
        return {PREFIX + name: t for name, t in own.items()} | self.lora.split(flat[count:], number)

    def build(self, tensors: dict[str, Tensor], job: PrefixJob, fields: dict[str, Any]) -> TunedWeights:
        """Make the weights with their prefix, whose base is the base model with the LoRA layers."""
        own = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        layers = {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}
        base = self._base_with(layers, fields["base"])
        made = self.rows.build(own, job, {**fields, "base": base})
        return TunedWeights(layers, self.lora.method, self.lora.options, prefix=made, **fields)

    def _base_with(self, layers: dict[str, Tensor], plain: Fingerprint) -> Fingerprint:
        """Fingerprint of the base model while LoRA layers act in it."""
        model = self.lora.model
        here = {name: t.to(model.device) for name, t in layers.items()}
        with applied(model, self.lora.method, here, self.lora.options):
            found = fingerprint(model.hf, None if model.tokenizer is None else model.tokenizer.digest_text)
        return {**plain, **found}


def make(data: GroupData) -> PrefixLoraState:
    """Initial prefix and LoRA layers."""
    config, (job,) = data.group.method_config, data.group.jobs
    lora_rate = METHODS["lora"].learning_rate if config.lora_learning_rate is None else config.lora_learning_rate
    assert lora_rate is not None
    lora = WeightsState(data, "lora", *initial_lora(data))
    return PrefixLoraState(prefix.make(data), lora, lora_rate / job.learning_rate)
