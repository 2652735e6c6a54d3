"""Method ``prefix``: keys and values of all layers, of many prefixes in the same batches (Li & Liang 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefixfast.attention.plan import (
    FRONT,
    LayerKV,
    Plan,
    PlannedPrefix,
    PrefixRows,
    PrefixUse,
    SitePrefixes,
    prefix_rows,
    training_plan,
)
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, seq2seq_training_plan
from prefixfast.config.sites import Site
from prefixfast.io.text import counted
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import filled_layers, seeing_layers
from prefixfast.model.text_kv import parameter_dtype
from prefixfast.prefix.kv import kv_by_layer, planned
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.batching import MicroBatch
from prefixfast.training.init import initial_kv
from prefixfast.training.parameters import ParameterOptions, PrefixParameters
from prefixfast.training.prefix_sites import TrainedPrefixes

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob


class PrefixState:
    """Keys and values of the n prefixes of a group.

    Args:
        data: Group with its rows.
        parameters: Trained parameters, from which the keys and values are computed.
    """

    def __init__(self, data: GroupData, parameters: TrainedPrefixes) -> None:
        model, group, frozen = data.model, data.group, data.job.on_top_of
        self.model, self.group, self.is_composed = model, group, frozen is not None
        self.parameters, self.params = parameters, parameters.params
        self.rows = {site: _rows(data, parameters, site) for site in model.sites}
        self.frozen: dict[Site, list[LayerKV]] = {}  # of the sites that nothing is trained at
        if frozen is not None:
            untrained = [site for site in model.sites if site not in parameters.by_site]
            self.frozen = {site: _frozen_kv(model, frozen, site) for site in untrained}

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""
        return self.parameters.num_trained

    @property
    def description(self) -> str:
        """Number of prefix rows, of each site of an encoder-decoder base model."""
        lengths = self.parameters.lengths
        if self.model.seq2seq is None:
            return counted(lengths["self"], "prefix row")
        by_site = ", ".join(f"{site} {length}" for site, length in lengths.items())
        return f"{counted(sum(lengths.values()), 'prefix row')} ({by_site})"

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the base model runs as it is."""
        return self.model.guard.running()

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the keys and values of the next forward pass."""
        self.parameters.refresh(steps, dropout=dropout)

    def backward(self) -> None:
        """Carry the gradients of the keys and values to the parameters."""
        self.parameters.backward()

    def plan(self, micro: MicroBatch) -> Plan | Seq2SeqPlan:
        """Attention plan in which each sequence sees its prefix, behind the frozen one if there is one."""
        count, used = len(micro.lengths), micro.prefix
        if self.is_composed:  # from left to right: the frozen prefix, which is the last in the leaves, and the own one
            used = np.stack([np.full_like(used, len(self.group.jobs)), used], 1).reshape(-1)
        use = PrefixUse(np.arange(count + 1, dtype=np.int32) * (2 if self.is_composed else 1), used)
        backend, device = self.model.backend, self.model.device
        if micro.encoder_lengths is not None:
            prefixes = {site: SitePrefixes(rows, self._leaves(site)) for site, rows in self.rows.items()}
            return seq2seq_training_plan(
                micro.lengths, micro.encoder_lengths, use, prefixes, backend=backend, device=device
            )
        return training_plan(
            micro.lengths,
            use,
            self.rows["self"],
            self._leaves("self"),
            backend=backend,
            device=device,
            last_prompt_token=micro.last_prompt_token,
        )

    def _leaves(self, site: Site) -> list[LayerKV] | None:
        """Keys and values by layer of a site, None for a site without prefixes."""
        own = self.parameters.by_site.get(site)
        return self.frozen.get(site) if own is None else own.leaves

    def current(self) -> list[Tensor]:
        """Keys and values of all prefixes."""
        return self.parameters.current()

    def split(self, flat: list[Tensor], number: int) -> dict[str, Tensor]:
        """Keys and values of one prefix by name."""
        return self.parameters.split(flat, number)

    def build(self, tensors: dict[str, Tensor], job: PrefixJob, fields: dict[str, Any]) -> Prefix:
        """Make the prefix."""
        return Prefix(tensors, self.group.pos_start, job.window, position=self.group.prefix_config.position, **fields)


def prefix_parameters(data: GroupData, init: Mapping[Site, Sequence[list[LayerKV] | None]]) -> TrainedPrefixes:
    """Parameters of the prefixes of a group.

    Args:
        data: Group with its rows.
        init: Initial keys and values by layer of each prefix, None for random ones, by trained site.
    """
    model, group, frozen = data.model, data.group, data.job.on_top_of
    seeds = [job.config.seed for job in group.jobs]
    options = ParameterOptions(group.prefix_config, group.uses_mlp, seeds, parameter_dtype(model.dtype), model.device)
    made = {}
    for site, values in init.items():
        before = () if frozen is None else kv_by_layer(frozen, model.sites[site], site)
        made[site] = PrefixParameters.make(model.sites[site], values, options, on_top_of=before, site=site)
    return TrainedPrefixes(made)


def make(data: GroupData) -> PrefixState:
    """Initial prefixes of a group."""
    group, frozen = data.group, data.job.on_top_of
    after = [] if frozen is None or frozen.position == "infix" else [frozen]  # a text before an infix does not see it
    init = initial_kv(data.model, group.jobs, group.prefix_config, data.job.init_options, after)
    return PrefixState(data, prefix_parameters(data, init))


def _rows(data: GroupData, parameters: TrainedPrefixes, site: Site) -> PrefixRows:
    """Rows of the prefixes of a group at a site, and behind them those of the frozen prefix."""
    model, group, frozen = data.model, data.group, data.job.on_top_of
    shapes, own = model.sites[site], parameters.by_site.get(site)
    layers = () if own is None else seeing_layers(shapes, own.layers)
    length = 0 if own is None else own.length
    place = model.handle.infix.place if group.prefix_config.position == "infix" else FRONT
    rows = [PlannedPrefix(layers, length, group.pos_start, job.window == "slide", place) for job in group.jobs]
    if frozen is not None:
        rows.append(planned(frozen, seeing_layers(shapes, filled_layers(frozen, shapes, site)), model, site))
    return prefix_rows(rows, len(shapes))


def _frozen_kv(model: Model, frozen: Prefix, site: Site) -> list[LayerKV]:
    """Keys and values of a frozen prefix by layer of a site, in the dtype of trained parameters."""
    dtype = parameter_dtype(model.dtype)
    return [
        (k.to(model.device, dtype), v.to(model.device, dtype)) for k, v in kv_by_layer(frozen, model.sites[site], site)
    ]
