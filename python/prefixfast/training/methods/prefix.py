"""Method ``prefix``: keys and values of all layers, of many prefixes in the same batches (Li & Liang 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

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
from prefixfast.io.text import span
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import filled_layers, seeing_layers, source_of
from prefixfast.model.text_kv import parameter_dtype
from prefixfast.prefix.kv import kv_by_layer, no_rows, planned
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.batching import MicroBatch
from prefixfast.training.init import initial_kv
from prefixfast.training.parameters import ParameterOptions, PrefixParameters
from prefixfast.training.prefix_sites import SiteLeaves, TrainedPrefixes, take_rows
from prefixfast.training.prefix_tensor import PrefixTensor

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob


class PrefixState:
    """Keys and values of the n prefixes of a group.

    Args:
        data: Group with its rows.
        blocks: Trained parameters of the blocks, from which the keys and values are computed. Every prefix is in one.
    """

    def __init__(self, data: GroupData, blocks: Sequence[TrainedPrefixes]) -> None:
        model, group, frozen = data.model, data.group, data.job.on_top_of
        self.model, self.group, self.is_composed = model, group, frozen is not None
        self.blocks = list(blocks)
        order = np.concatenate([block.numbers for block in blocks])
        self._place = np.argsort(order).astype(np.int32)  # of the rows of each prefix
        self._block_of = {int(i): (b, j) for b, block in enumerate(blocks) for j, i in enumerate(block.numbers)}
        self._owners = [_owners(block, len(order), model) for block in blocks]
        self.params = [PrefixTensor(t, owners) for block, owners in self._each() for t in block.params]
        self.rows = {site: _rows(data, self.blocks, site) for site in model.sites}
        trained = [site for site in model.sites if any(site in block.by_site for block in blocks)]
        self.joined = {site: _joined(data, self.blocks, site) for site in trained} if len(blocks) > 1 else {}
        self.frozen: dict[Site, list[LayerKV]] = {}  # of the sites that nothing is trained at
        if frozen is not None:
            self.frozen = {site: _frozen_kv(model, frozen, site) for site in model.sites if site not in trained}

    def _each(self) -> Iterator[tuple[TrainedPrefixes, Tensor | None]]:
        return zip(self.blocks, self._owners, strict=True)

    def num_trained(self, number: int) -> int:
        """Number of parameters that training adjusts for a prefix with a number."""
        return self.block(number).num_trained

    def block(self, number: int) -> TrainedPrefixes:
        """Block of a prefix with a number."""
        return self.blocks[self._block_of[number][0]]

    def describe(self, numbers: Sequence[int]) -> str:
        """Number of rows of some prefixes, of each site of an encoder-decoder base model."""
        blocks = [self.block(i) for i in numbers]
        sites = [site for site in self.model.sites if any(site in block.by_site for block in blocks)]
        by_site = {site: span([block.length_at(site) for block in blocks]) for site in sites}
        rows = [sum(own.length for own in block.by_site.values()) for block in blocks]
        total = f"{span(rows)} {'prefix row' if {*rows} == {1} else 'prefix rows'}"
        if self.model.seq2seq is None:
            return total
        return f"{total} ({', '.join(f'{site} {length}' for site, length in by_site.items())})"

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the base model runs as it is."""
        return self.model.guard.running()

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the keys and values of the next forward pass."""
        for block in self.blocks:
            block.refresh(steps, dropout=dropout)
        for joined in self.joined.values():
            joined.refresh()

    def backward(self) -> None:
        """Carry the gradients of the keys and values to the parameters."""
        for joined in self.joined.values():
            joined.backward()
        for block in self.blocks:
            block.backward()

    def plan(self, micro: MicroBatch) -> Plan | Seq2SeqPlan:
        """Attention plan in which each sequence sees its prefix, behind the frozen one if there is one."""
        count, used = len(micro.lengths), self._place[micro.prefix]
        if self.is_composed:  # from left to right: the frozen prefix, which is the last in the leaves, and the own one
            used = np.stack([np.full_like(used, len(self.group.jobs)), used], 1).reshape(-1)
        numbers, own = np.unique(used, return_inverse=True)
        prefixes = {site: self._prefixes(site, numbers) for site in self.rows}
        indptr = np.arange(count + 1, dtype=np.int32) * (2 if self.is_composed else 1)
        use = PrefixUse(indptr, own.reshape(-1).astype(np.int32))
        backend, device = self.model.backend, self.model.device
        if micro.encoder_lengths is not None:
            return seq2seq_training_plan(
                micro.lengths, micro.encoder_lengths, use, prefixes, backend=backend, device=device
            )
        return training_plan(
            micro.lengths,
            use,
            *prefixes["self"],
            backend=backend,
            device=device,
            last_prompt_token=micro.last_prompt_token,
        )

    def _prefixes(self, site: Site, numbers: np.ndarray) -> SitePrefixes:
        """Rows, keys and values at a site of the prefixes of a micro-batch."""
        rows, leaves = self.rows[site], self._leaves(site)
        if leaves is None or len(numbers) == rows.table.shape[1]:
            return SitePrefixes(rows, leaves)
        rows, by_view = rows.only(numbers)
        places = [torch.from_numpy(at).to(self.model.device) for at in by_view]
        by_layer = [places[rows.view_of[i] if rows.view_of else 0] for i in range(len(leaves))]
        return SitePrefixes(rows, take_rows(leaves, by_layer))

    def _leaves(self, site: Site) -> list[LayerKV] | None:
        """Keys and values by layer of a site, None for a site without prefixes."""
        own = self.joined.get(site) or self.blocks[0].by_site.get(site)
        return self.frozen.get(site) if own is None else own.leaves

    def current(self) -> list[PrefixTensor]:
        """Keys and values of all prefixes."""
        return [PrefixTensor(t, owners) for block, owners in self._each() for t in block.current()]

    def split(self, flat: Sequence[PrefixTensor], number: int) -> dict[str, Tensor]:
        """Keys and values of one prefix by name."""
        block, own = self._block_of[number]
        return self.blocks[block].split([t.tensor for t in flat if t.owners is self._owners[block]], own)

    def build(self, tensors: dict[str, Tensor], job: PrefixJob, fields: dict[str, Any]) -> Prefix:
        """Make the prefix."""
        return Prefix(tensors, job.pos_start, job.window, position=job.prefix_config.position, **fields)


def prefix_parameters(
    data: GroupData, numbers: Sequence[int], init: Mapping[Site, Sequence[list[LayerKV] | None]], *, is_only: bool
) -> TrainedPrefixes:
    """Parameters of a block of prefixes.

    Args:
        data: Group with its rows.
        numbers: Numbers of the prefixes in the group, ascending.
        init: Initial keys and values by layer of each prefix, None for random ones, by trained site.
        is_only: Whether the group has no other block, so that its leaves hold the frozen prefix too.
    """
    model, frozen = data.model, data.job.on_top_of if is_only else None
    jobs = [data.group.jobs[i] for i in numbers]
    first, seeds = jobs[0], [job.config.seed for job in jobs]
    options = ParameterOptions(first.prefix_config, first.uses_mlp, seeds, parameter_dtype(model.dtype), model.device)
    made = {}
    for site, values in init.items():
        before = () if frozen is None else kv_by_layer(frozen, model.sites[site], site)
        made[site] = PrefixParameters.make(model.sites[site], values, options, on_top_of=before, site=site)
    return TrainedPrefixes(numbers, made)


def make(data: GroupData) -> PrefixState:
    """Initial prefixes of a group."""
    frozen, numbered = data.job.on_top_of, data.group.blocks()
    after = [] if frozen is None or frozen.position == "infix" else [frozen]  # a text before an infix does not see it
    blocks = []
    for numbers in numbered:
        jobs = [data.group.jobs[i] for i in numbers]
        init = initial_kv(data.model, jobs, jobs[0].prefix_config, data.job.init_options, after)
        blocks.append(prefix_parameters(data, numbers, init, is_only=len(numbered) == 1))
    return PrefixState(data, blocks)


def _rows(data: GroupData, blocks: Sequence[TrainedPrefixes], site: Site) -> PrefixRows:
    """Rows of the prefixes of a group at a site, block by block, and behind them those of the frozen prefix."""
    model, group, frozen = data.model, data.group, data.job.on_top_of
    shapes = model.sites[site]
    place = model.handle.infix.place if group.position == "infix" else FRONT
    rows = []
    for block in blocks:
        layers = seeing_layers(shapes, block.by_site[site].layers) if site in block.by_site else ()
        rows += [
            PlannedPrefix(layers, block.length_at(site), job.pos_start, job.window == "slide", place)
            for job in (group.jobs[i] for i in block.numbers)
        ]
    if frozen is not None:
        rows.append(planned(frozen, seeing_layers(shapes, filled_layers(frozen, shapes, site)), model, site))
    return prefix_rows(rows, len(shapes))


def _joined(data: GroupData, blocks: Sequence[TrainedPrefixes], site: Site) -> SiteLeaves:
    """Keys and values of all blocks at a site, with those of the frozen prefix."""
    model, frozen = data.model, data.job.on_top_of
    shapes = model.sites[site]
    none = no_rows(shapes, torch.empty(0, dtype=parameter_dtype(model.dtype), device=model.device))
    before = none if frozen is None else _frozen_kv(model, frozen, site)
    own = [block.by_site[site] for block in blocks if site in block.by_site]
    return SiteLeaves(own, before, source_of(shapes))


def _owners(block: TrainedPrefixes, count: int, model: Model) -> Tensor | None:
    """Numbers of the prefixes of a block, None for all of ``count`` prefixes."""
    return None if len(block.numbers) == count else torch.from_numpy(block.numbers).to(model.device)


def _frozen_kv(model: Model, frozen: Prefix, site: Site) -> list[LayerKV]:
    """Keys and values of a frozen prefix by layer of a site, in the dtype of trained parameters."""
    dtype = parameter_dtype(model.dtype)
    return [
        (k.to(model.device, dtype), v.to(model.device, dtype)) for k, v in kv_by_layer(frozen, model.sites[site], site)
    ]
