"""Method ``prefix``: keys and values of all layers, of many prefixes in the same batches (Li & Liang 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefixfast.attention.plan import FRONT, LayerKV, Plan, PlannedPrefix, PrefixUse, prefix_rows, training_plan
from prefixfast.io.text import counted
from prefixfast.model.prefix_shape import filled_layers, seeing_layers
from prefixfast.model.text_kv import parameter_dtype
from prefixfast.prefix.kv import kv_by_layer, planned
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.batching import MicroBatch
from prefixfast.training.init import initial_kv
from prefixfast.training.parameters import ParameterOptions, PrefixParameters

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.training.embeddings import EmbeddingParameters
    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob


class PrefixState:
    """Keys and values of the n prefixes of a group.

    Args:
        data: Group with its rows.
        parameters: Trained parameters, from which the keys and values are computed.
    """

    def __init__(self, data: GroupData, parameters: PrefixParameters | EmbeddingParameters) -> None:
        model, group, on_top_of = data.model, data.group, data.job.on_top_of
        self.model, self.group, self.is_composed = model, group, on_top_of is not None
        self.parameters, self.params = parameters, parameters.params
        seeing = seeing_layers(model.layers, parameters.layers)
        length, pos_start = group.prefix_config.length, group.pos_start
        place = model.handle.infix.place if group.prefix_config.position == "infix" else FRONT
        rows = [PlannedPrefix(seeing, length, pos_start, job.window == "slide", place) for job in group.jobs]
        if on_top_of is not None:
            seeing = seeing_layers(model.layers, filled_layers(on_top_of, model.layers))
            rows.append(planned(on_top_of, seeing, model))
        self.prefix_rows = prefix_rows(rows, len(model.layers))

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""
        return self.parameters.num_trained

    @property
    def description(self) -> str:
        """Number of prefix rows."""
        return counted(self.parameters.length, "prefix row")

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the base model runs as it is."""
        return self.model.guard.running()

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the keys and values of the next forward pass."""
        self.parameters.refresh(steps, dropout=dropout)

    def backward(self) -> None:
        """Carry the gradients of the keys and values to the parameters."""
        self.parameters.backward()

    def plan(self, micro: MicroBatch) -> Plan:
        """Attention plan in which each sequence sees its prefix, behind the frozen one if there is one."""
        count, used = len(micro.lengths), micro.prefix
        if self.is_composed:  # from left to right: the frozen prefix, which is the last in the leaves, and the own one
            used = np.stack([np.full_like(used, len(self.group.jobs)), used], 1).reshape(-1)
        use = PrefixUse(np.arange(count + 1, dtype=np.int32) * (2 if self.is_composed else 1), used)
        return training_plan(
            micro.lengths,
            use,
            self.prefix_rows,
            self.parameters.leaves,
            backend=self.model.backend,
            device=self.model.device,
            last_prompt_token=micro.last_prompt_token,
        )

    def current(self) -> list[Tensor]:
        """Keys and values of all prefixes."""
        return self.parameters.current()

    def split(self, flat: list[Tensor], number: int) -> dict[str, Tensor]:
        """Keys and values of one prefix by name."""
        return self.parameters.split(flat, number)

    def build(self, tensors: dict[str, Tensor], job: PrefixJob, fields: dict[str, Any]) -> Prefix:
        """Make the prefix."""
        return Prefix(tensors, self.group.pos_start, job.window, position=self.group.prefix_config.position, **fields)


def prefix_parameters(data: GroupData, init: Sequence[list[LayerKV] | None]) -> PrefixParameters:
    """Parameters of the prefixes of a group.

    Args:
        data: Group with its rows.
        init: Initial keys and values by layer of each prefix, None for random ones.
    """
    model, group, on_top_of = data.model, data.group, data.job.on_top_of
    seeds = [job.config.seed for job in group.jobs]
    dtype = parameter_dtype(model.dtype)
    options = ParameterOptions(group.prefix_config, group.uses_mlp, seeds, dtype, model.device)
    before = () if on_top_of is None else kv_by_layer(on_top_of, model.layers)
    return PrefixParameters.make(model.layers, init, options, on_top_of=before)


def make(data: GroupData) -> PrefixState:
    """Initial prefixes of a group."""
    group, frozen = data.group, data.job.on_top_of
    after = [] if frozen is None or frozen.position == "infix" else [frozen]  # a text before an infix does not see it
    init = initial_kv(data.model, group.jobs, group.prefix_config, data.job.init_options, after)
    return PrefixState(data, prefix_parameters(data, init))
