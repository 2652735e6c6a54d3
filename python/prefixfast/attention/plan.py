"""The Plan: what a packed forward or a decode step needs besides the tokens, and the functions that make one.

A plan is immutable and travels as a keyword of the model's forward, so that a recomputation in the backward uses the
plan of its own forward.
Shape letters: S sequences, N packed tokens, R decode rows, P prefix rows, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.planner_tables import FIXED_INFIX as FIXED_INFIX
from prefixfast.attention.planner_tables import FRONT as FRONT
from prefixfast.attention.planner_tables import INFIX as INFIX
from prefixfast.attention.planner_tables import NO_PREFIXES as NO_PREFIXES
from prefixfast.attention.planner_tables import Layout as Layout
from prefixfast.attention.planner_tables import PlannedPrefix as PlannedPrefix
from prefixfast.attention.planner_tables import PrefixRows as PrefixRows
from prefixfast.attention.planner_tables import decode_tables, packed_tables
from prefixfast.attention.planner_tables import host_table as host_table
from prefixfast.attention.planner_tables import prefix_rows as prefix_rows
from prefixfast.attention.planner_tables import section as section
from prefixfast.config.sites import Site
from prefixfast_kernels.tables import DecodeTables, PackedTables
from prefixfast_kernels.tile_selection import Backend

LayerKV = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Arena:
    """Memory in which inference keeps keys and values.

    Attributes:
        layers: Keys and values of each layer, ``[arena rows, H, D]``. Prefix blocks, prompts and generated tokens are
            rows of these tensors. A layer that reads the keys of another layer has the tensors of that layer.
        table: Slot table, int32 ``[decode rows, Tmax]``: arena row of each token of each decode row.
        readers: Layers that read the keys of another layer, and write none.
        encoder_layers: Keys and values of the prefixes of each encoder layer, views of ``layers`` with the encoder's
            heads. Empty for a decoder-only base.
    """

    layers: Sequence[LayerKV]
    table: Tensor
    readers: frozenset[int] = frozenset()
    encoder_layers: Sequence[LayerKV] = ()


class AttentionCall(NamedTuple):
    """Inputs and log-sum-exp of the attention of one layer in a packed forward.

    Attributes:
        layer: Index of the layer.
        q: Queries ``[N, HQ, D]``, after RoPE.
        k: Keys ``[M, H, D]``, after RoPE. M is N but for cross-attention.
        v: Values ``[M, H, D]``.
        lse: Natural log-sum-exp of all scores ``[N, HQ]``.
        scale: Factor on the scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Cap of the scores, 0 for none.
        site: Kind of attention.
        bias: Position bias ``[HQ, 2 * maxd + 1]`` by clamped (key position - query position), None without one.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    scale: float
    window: int
    softcap: float
    site: Site = "self"
    bias: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """One packed forward or decode step. An encoder-decoder base has one plan for each kind of attention.

    Attributes:
        position_ids: Positions of the tokens, ``[1, N]`` or, in decode, ``[1, R]``.
        backend: Kernels that attention runs on.
        reach: Largest number of keys that one query can see. A window of at least this many tokens hides nothing.
        packed: Tables of a packed forward (training or prefill) for each view. A view is the set of layers in which the
            same prefixes lie.
        decode: Tables of a decode step for each view.
        view_of: View of each layer; empty for a single view.
        prefix: Trained keys and values of the batch's prefixes for each layer, ``[sum P, H, D]``, or None if the prefix
            rows lie in the arena.
        arena: Keys, values and slot table of inference, or None in training.
        slots: Arena row of each new token, ``[N]``.
        key_slots: Arena rows of all keys of a prefill that continues prompts, or None if its keys are its tokens.
        max_len: Length of the longest row of a decode step in tokens.
        logits_at: Indices of the tokens whose logits are computed, ``[n]``, or None for all tokens.
        probe: Function called after every attention of a packed forward, or None. An exception that it raises ends the
            forward.
        causal: Whether keys after the query are hidden.
        square: Whether the queries of each sequence are its last keys.
        num_keys: Number M of keys of a packed forward whose keys are not its tokens, else None.
    """

    position_ids: Tensor
    backend: Backend
    reach: int
    packed: Sequence[PackedTables] | None = None
    decode: Sequence[DecodeTables] | None = None
    view_of: Sequence[int] = ()
    prefix: Sequence[LayerKV] | None = None
    arena: Arena | None = None
    slots: Tensor | None = None
    key_slots: Tensor | None = None
    max_len: int = 0
    logits_at: Tensor | None = None
    probe: Callable[[AttentionCall], None] | None = None
    causal: bool = True
    square: bool = True
    num_keys: int | None = None

    def window(self, sliding_window: int | None) -> int:
        """Sliding window of a layer in tokens if it can hide a key in this forward, else 0."""
        return sliding_window if sliding_window and sliding_window < self.reach else 0

    def view(self, layer: int) -> int:
        """Index of the tables that a layer reads."""
        return self.view_of[layer] if self.view_of else 0

    def with_logits_at(self, index: Tensor) -> Plan:
        """The same plan with logits of the tokens ``index`` ``[n]`` only."""
        return replace(self, logits_at=index)


class PrefixUse(NamedTuple):
    """Prefixes that each sequence of a packed forward sees.

    Attributes:
        indptr: Offsets into ``numbers``, int32 ``[S + 1]``. Sequence s sees the prefixes
            ``numbers[indptr[s]:indptr[s + 1]]``, composed left to right.
        numbers: Numbers of prefixes, int32.
    """

    indptr: NDArray[np.int32]
    numbers: NDArray[np.int32]


class SitePrefixes(NamedTuple):
    """Prefixes of a batch in one kind of attention.

    Attributes:
        rows: Rows of each prefix, made by `prefix_rows`.
        kv: Keys and values of the prefixes for each layer, ``[sum P, H, D]``, to which gradients flow. None without
            prefixes.
    """

    rows: PrefixRows
    kv: Sequence[LayerKV] | None


class AttentionKind(NamedTuple):
    """Keys and mask of one kind of attention in a packed forward.

    Attributes:
        causal: Whether keys after the query are hidden.
        key_lengths: Number of keys of each sequence, int32 ``[S]``, if they are not its tokens, else None.
        last_prompt_token: Index of the last prompt token of each sequence, int32 ``[S]``, before which its infixes
            stand. None without infixes.
    """

    causal: bool = True
    key_lengths: NDArray[np.int32] | None = None
    last_prompt_token: NDArray[np.int32] | None = None


def training_plan(
    lengths: NDArray[np.int32],
    used: PrefixUse,
    rows: PrefixRows,
    prefix: Sequence[LayerKV] | None,
    *,
    backend: Backend,
    device: torch.device | str = "cpu",
    last_prompt_token: NDArray[np.int32] | None = None,
) -> Plan:
    """Plan of a packed forward whose keys are its own tokens, not rows of an arena.

    Args:
        lengths: Number of tokens of each sequence, int32 ``[S]``.
        used: Prefixes that each sequence sees.
        rows: Rows of each prefix, made by `prefix_rows`.
        prefix: Keys and values of the prefixes for each layer, ``[sum P, H, D]``, to which gradients flow. None without
            prefixes.
        backend: Kernels that attention runs on.
        device: Device of the model.
        last_prompt_token: Index of the last prompt token of each sequence, int32 ``[S]``, before which its infixes
            stand. None without infixes.
    """
    kind = AttentionKind(last_prompt_token=last_prompt_token)
    return packed_plan(lengths, used, SitePrefixes(rows, prefix), kind, backend=backend, device=device)


def packed_plan(
    lengths: NDArray[np.int32],
    used: PrefixUse,
    prefixes: SitePrefixes,
    kind: AttentionKind,
    *,
    backend: Backend,
    device: torch.device | str,
) -> Plan:
    """Plan of one kind of attention of a packed forward without an arena.

    Args:
        lengths: Number of queries of each sequence, int32 ``[S]``.
        used: Prefixes that each sequence sees.
        prefixes: Rows, keys and values of the prefixes.
        kind: Keys and mask.
        backend: Kernels that attention runs on.
        device: Device of the model.
    """
    rows = prefixes.rows
    assert kind.last_prompt_token is not None or not rows.table[:, :, 4].any()
    planned = [
        _rust.plan_packed(
            lengths,
            *used,
            table,
            tiles=backend.sizes[:3],
            last_prompt_token=kind.last_prompt_token,
            key_lengths=kind.key_lengths,
            padded=kind.causal,
        )
        for table in rows.table
    ]
    buffers = [torch.from_numpy(view.buffer).to(device) for view in planned]
    positions = section(buffers[0], planned[0].sections["position_ids"])[None]
    depth = int(np.diff(used.indptr).max(initial=0))
    backend = replace(backend, sizes=backend.sizes._replace(depth=depth))
    packed = [packed_tables(buffer, view.sections) for buffer, view in zip(buffers, planned, strict=True)]
    return Plan(
        positions,
        backend,
        max(view.reach for view in planned),
        packed=packed,
        view_of=rows.view_of,
        prefix=prefixes.kv,
        causal=kind.causal,
        square=kind.key_lengths is None,
        num_keys=None if kind.key_lengths is None else int(kind.key_lengths.sum()),
    )


def plain_plan(lengths: Sequence[int], *, backend: Backend, device: torch.device | str = "cpu") -> Plan:
    """Plan of sequences without prefixes.

    Args:
        lengths: Number of tokens of each sequence.
        backend: Kernels that attention runs on.
        device: Device of the model.
    """
    used = PrefixUse(np.zeros(len(lengths) + 1, np.int32), np.zeros(0, np.int32))
    return training_plan(np.array(lengths, np.int32), used, NO_PREFIXES, None, backend=backend, device=device)


def prefill_plan(tables: Tensor, layout: Layout, reach: int, arena: Arena, backend: Backend) -> Plan:
    """Plan of the prompt tokens of an engine step. The arena row of each token is written to the slot table.

    Args:
        tables: Buffer of the planner on the model's device, int32.
        layout: Place of each table in the buffer.
        reach: Largest number of keys that one query can see.
        arena: Keys, values and slot table of the engine.
        backend: Kernels that attention runs on.
    """
    places = layout.views[0]
    fill = section(tables, places["fill"]).long()
    arena.table[fill[:, 0], fill[:, 1]] = fill[:, 2].int()
    return Plan(
        section(tables, places["position_ids"])[None],
        backend,
        reach,
        packed=[packed_tables(tables, view) for view in layout.views],
        view_of=layout.view_of,
        arena=arena,
        slots=section(tables, places["slots"]),
        key_slots=section(tables, places["key_slots"]) if places["key_slots"][1] > 0 else None,
        logits_at=section(tables, places["logits_idx"]).long(),
    )


def decode_plan(tables: Tensor, layout: Layout, reach: int, max_len: int, arena: Arena, backend: Backend) -> Plan:
    """Plan of the next token of every running row. The arena row of each token is written to the slot table.

    Args:
        tables: Buffer of the planner on the model's device, int32.
        layout: Place of each table in the buffer.
        reach: Largest number of keys that one query can see.
        max_len: Length of the longest row of the step in tokens.
        arena: Keys, values and slot table of the engine.
        backend: Kernels that attention runs on.
    """
    views = [decode_tables(tables, view) for view in layout.views]
    places = layout.views[0]
    slots = section(tables, places["slot"])
    arena.table[views[0].row.long(), views[0].lens.long() - 1] = slots
    positions = section(tables, places["position_ids"])[None]
    return Plan(
        positions, backend, reach, decode=views, view_of=layout.view_of, arena=arena, slots=slots, max_len=max_len
    )
