"""The Plan: what one packed forward needs besides the tokens. The only place that turns the Rust planner's buffers into tensors.

Shape letters: S sequences, N packed tokens, R decode rows, L layers, P prefix rows, H kv heads, D head dim.
A plan is immutable and travels as a keyword of the model's forward, so that recomputation in backward sees the plan of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast import _rust
from prefixfast_kernels.tables import DecodeTables, PackedTables
from prefixfast_kernels.tile_configs import Backend

LayerKV = tuple[Tensor, Tensor]
Sections = Mapping[str, tuple[int, int, int]]


class Layout(NamedTuple):
    """Where the tables of one forward lie in the planner's buffer.

    Attributes:
        views: By view, by name: offset, rows, columns. Layers in which the same prefixes lie are one view.
        view_of: By layer: its view; empty for a single view.
    """

    views: Sequence[Sections]
    view_of: Sequence[int] = ()

    @property
    def end(self) -> int:
        """Entries of the buffer up to the last table's end."""
        return max(offset + rows * max(cols, 1) for view in self.views for offset, rows, cols in view.values())


class PrefixRows(NamedTuple):
    """Where prefixes lie in each layer's tensor of all of them.

    Attributes:
        table: int32 ``[views, prefixes, 4]``: first row, rows (0 where a prefix leaves the layer out), pos_start, slides.
        view_of: By layer: its view; empty for a single view.
    """

    table: NDArray[np.int32]
    view_of: Sequence[int] = ()


NO_PREFIXES = PrefixRows(np.zeros((1, 0, 4), np.int32))


@dataclass(frozen=True)
class Arena:
    """Where inference keeps keys and values.

    Attributes:
        layers: Per layer keys and values ``[arena rows, H, D]``; prefix blocks, prompts and generated tokens are rows of them.
        table: ``[decode rows, Tmax]`` int32: arena row of each token of each decode row.
    """

    layers: Sequence[LayerKV]
    table: Tensor


class AttentionCall(NamedTuple):
    """What one attention call of a packed forward saw.

    Attributes:
        layer: Which layer.
        q: Queries ``[N, HQ, D]``, after RoPE.
        k: Keys ``[N, H, D]``, after RoPE.
        lse: Natural log-sum-exp of all scores ``[N, HQ]``.
        scale: Multiplied the scores.
        window: Sliding window in tokens, 0 for none.
        softcap: Score cap, 0 for none.
    """

    layer: int
    q: Tensor
    k: Tensor
    lse: Tensor
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class Plan:
    """One packed forward.

    Attributes:
        position_ids: ``[1, N]`` or, in decode, ``[1, R]``.
        backend: Which kernels attention runs on.
        reach: Most keys that one query can see; a window of at least this many tokens cuts nothing.
        packed: Tables of training and prefill, by view: layers in which the same prefixes lie.
        decode: Tables of a decode step, by view.
        view_of: By layer: its view; empty for a single view.
        prefix: Per layer the trained keys and values ``[sum P, H, D]`` of the batch's prefixes; None: prefix rows lie in the arena.
        arena: Inference only.
        slots: ``[N]`` arena row of each new token.
        key_slots: Arena rows of all keys of a prefill that continues prompts; None: its keys are its tokens.
        max_len: Longest row of a decode step.
        logits_at: ``[n]`` tokens whose logits are wanted; None: all.
        probe: Function that is called after every attention of a packed forward. An exception that it raises ends the forward.
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

    def window(self, sliding_window: int | None) -> int:
        """The layer's sliding window in tokens if it can hide something in this forward, else 0."""
        return sliding_window if sliding_window and sliding_window < self.reach else 0

    def view(self, layer: int) -> int:
        """Which of the tables a layer reads."""
        return self.view_of[layer] if self.view_of else 0

    def with_logits_at(self, index: Tensor) -> Plan:
        """The same plan with logits at ``index`` ``[n]`` only."""
        return replace(self, logits_at=index)


def section(buffer: Tensor, place: tuple[int, int, int]) -> Tensor:
    """The view of one table."""
    offset, rows, cols = place
    return buffer.narrow(0, offset, rows * cols).view(rows, cols) if cols else buffer.narrow(0, offset, rows)


def host_table(buffer: NDArray[np.int32], place: tuple[int, int, int]) -> NDArray[np.int32]:
    """One table of a planner's buffer in host memory, as a view."""
    offset, rows, cols = place
    return buffer[offset : offset + rows * cols].reshape(rows, cols) if cols else buffer[offset : offset + rows]


def packed_tables(buffer: Tensor, sections: Sections) -> PackedTables:
    """The packed tables of a planner's buffer."""
    return PackedTables(*(section(buffer, sections[name]) for name in PackedTables._fields))


def prefix_rows(prefixes: Sequence[tuple[Sequence[int], int, int, bool]], num_layers: int) -> PrefixRows:
    """Places of prefixes whose rows follow each other in every layer's tensor.

    Args:
        prefixes: Of each the layers it lies in, rows, pos_start, and whether sliding windows slide over it.
        num_layers: Of the base.
    """
    if not prefixes:
        return NO_PREFIXES
    has = np.array([np.isin(np.arange(num_layers), layers) for layers, *_ in prefixes])
    kinds, view_of = np.unique(has, axis=1, return_inverse=True)
    rows = kinds.T * np.array([rows for _, rows, *_ in prefixes], np.int64)  # [views, prefixes]
    same = [
        np.broadcast_to(np.array(column, np.int64), rows.shape)
        for column in ([p[2] for p in prefixes], [p[3] for p in prefixes])
    ]
    table = np.stack([rows.cumsum(1) - rows, rows, *same], 2).astype(np.int32)
    return PrefixRows(table, () if len(table) == 1 else view_of.reshape(-1).tolist())


def training_plan(
    lengths: NDArray[np.int32],
    prefix_indptr: NDArray[np.int32],
    prefix_of: NDArray[np.int32],
    rows: PrefixRows,
    prefix: Sequence[LayerKV] | None,
    *,
    backend: Backend,
    device: torch.device | str = "cpu",
) -> Plan:
    """Plan of one micro-batch on separate keys.

    Args:
        lengths: Tokens of each sequence, int32 ``[S]``.
        prefix_indptr: int32 ``[S + 1]``: sequence s sees prefixes ``prefix_of[prefix_indptr[s]:prefix_indptr[s + 1]]``, composed left to right.
        prefix_of: int32, numbers of prefixes.
        rows: See `prefix_rows`.
        prefix: Per layer keys and values ``[sum P, H, D]``; gradients flow to them. None without prefixes.
        backend: Which kernels attention runs on.
        device: Where the model runs.
    """
    planned = [
        _rust.plan_packed(lengths, prefix_indptr, prefix_of, table, tiles=backend.sizes[:3]) for table in rows.table
    ]
    buffers = [torch.from_numpy(view.buffer).to(device) for view in planned]
    positions = section(buffers[0], planned[0].sections["position_ids"])[None]
    depth = int(np.diff(prefix_indptr).max(initial=0))
    backend = replace(backend, sizes=backend.sizes._replace(depth=depth))
    packed = [packed_tables(buffer, view.sections) for buffer, view in zip(buffers, planned, strict=True)]
    return Plan(
        positions, backend, max(view.reach for view in planned), packed=packed, view_of=rows.view_of, prefix=prefix
    )


def plain_plan(lengths: Sequence[int], *, backend: Backend, device: torch.device | str = "cpu") -> Plan:
    """Plan of sequences of these lengths without prefixes."""
    none = np.zeros(0, np.int32)
    return training_plan(
        np.array(lengths, np.int32),
        np.zeros(len(lengths) + 1, np.int32),
        none,
        NO_PREFIXES,
        None,
        backend=backend,
        device=device,
    )


def prefill_plan(tables: Tensor, layout: Layout, reach: int, arena: Arena, backend: Backend) -> Plan:
    """Plan of the prompt tokens of an engine step; the arena row of each token is written into the slot table.

    Args:
        tables: Planner's buffer on the model's device, int32.
        layout: Place of each table in the buffer.
        reach: Most keys that one query can see.
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
    """Plan of the next token of every running row; the arena row of each token is written into the slot table.

    Args:
        tables: Planner's buffer on the model's device, int32.
        layout: Place of each table in the buffer.
        reach: Most keys that one query can see.
        max_len: Longest row of the step in tokens.
        arena: Keys, values and slot table of the engine.
        backend: Kernels that attention runs on.
    """
    views = [DecodeTables(*(section(tables, places[name]) for name in DecodeTables._fields)) for places in layout.views]
    places = layout.views[0]
    slots = section(tables, places["slot"])
    arena.table[views[0].row.long(), views[0].lens.long() - 1] = slots
    positions = section(tables, places["position_ids"])[None]
    return Plan(
        positions, backend, reach, decode=views, view_of=layout.view_of, arena=arena, slots=slots, max_len=max_len
    )
