"""Forwards of the proof through the plans of training and of the engine.

Shape letters: N packed tokens, H kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast import _rust
from prefixfast.attention.ops import Backend
from prefixfast.attention.plan import (
    Arena,
    LayerKV,
    Layout,
    PrefixUse,
    decode_plan,
    host_table,
    plain_plan,
    prefill_plan,
    prefix_rows,
    training_plan,
)
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.packed_forward import packed_forward
from prefixfast.model.proof.cases import NEW, Cases

RESERVED_ROWS = 80  # arena rows that the scheduler keeps
ROW_UNIT = 16  # the scheduler hands out arena rows in units of this size
STEP_TOKENS = 64  # tokens of a step; the long text is longer, so that its prompt is filled over several steps


@dataclass(frozen=True)
class Packed:
    """Attached model with its layers.

    Attributes:
        model: Attached model.
        shapes: Heads of every layer.
        backend: Kernels that attention runs on.
    """

    model: PreTrainedModel
    shapes: Sequence[LayerShape]
    backend: Backend

    def arena(self, rows: int, table: Tensor) -> Arena:
        """Arena of zeros. A layer that reads the keys of another layer has the tensors of that layer.

        Args:
            rows: Number of rows.
            table: Slot table.
        """

        def zeros(s: LayerShape) -> Tensor:
            dim = max(s.head_dim, s.value_dim)
            return torch.zeros(rows, s.num_kv_heads, dim, dtype=self.model.dtype, device=self.model.device)

        own = [(zeros(s), zeros(s)) if s.source is None else None for s in self.shapes]
        layers = [own[i if s.source is None else s.source] for i, s in enumerate(self.shapes)]
        return Arena([kv for kv in layers if kv is not None], table)

    @torch.no_grad()
    def texts(self, texts: Sequence[Tensor]) -> tuple[Tensor, list[LayerKV]]:
        """Logits ``[N, V]`` of packed sequences without prefixes, and the keys and values ``[N, H, D]`` by layer."""
        lengths = [len(ids) for ids in texts]
        plan = plain_plan(lengths, backend=self.backend, device=self.model.device)
        arena = self.arena(sum(lengths), torch.empty(0, dtype=torch.int32))
        slots = torch.arange(sum(lengths), dtype=torch.int32, device=self.model.device)
        logits = packed_forward(self.model, replace(plan, arena=arena, slots=slots), torch.cat(list(texts)))
        layers = [
            (k[..., : s.head_dim], v[..., : s.value_dim]) for (k, v), s in zip(arena.layers, self.shapes, strict=True)
        ]
        return logits, layers

    @torch.no_grad()
    def training(self, cases: Cases, kv: Sequence[Sequence[LayerKV]]) -> Tensor:
        """Logits ``[N, V]`` of all sequences but the first in one packed forward, by the plan of training.

        Args:
            cases: Sequences. The first one has no prefix and is in `texts`.
            kv: Keys and values ``[P, H, D]`` by layer of each prefix.
        """
        layers = tuple(range(len(self.shapes)))
        rows = prefix_rows([(layers, p.rows, p.pos_start, True) for p in cases.prefixes], len(layers))
        prefix = [tuple(torch.cat([own[i][side] for own in kv]) for side in (0, 1)) for i in layers]
        used = [[] if c.prefix is None else [c.prefix] for c in cases.all[1:]]
        use = PrefixUse(
            np.cumsum([0, *map(len, used)], dtype=np.int32), np.array([n for own in used for n in own], np.int32)
        )
        lengths = np.array([len(c.ids) for c in cases.all[1:]], np.int32)
        pairs = [(k, v) for k, v in prefix]
        plan = training_plan(lengths, use, rows, pairs, backend=self.backend, device=self.model.device)
        return packed_forward(self.model, plan, torch.cat([c.ids for c in cases.all[1:]]))

    @torch.no_grad()
    def engine(self, cases: Cases, kv: Sequence[Sequence[LayerKV]]) -> list[Served]:
        """Logits of all sequences from prefill and decode steps over an arena, by the plans of the engine.

        Args:
            cases: Sequences. The last tokens of each are given to decode steps.
            kv: Keys and values ``[P, H, D]`` by layer of each prefix.
        """
        return _Engine(self, cases, kv).run()


class Served(NamedTuple):
    """Logits of one token from the engine's plans.

    Attributes:
        case: Number of the sequence.
        token: Index of the token in its sequence.
        step: ``"prefill"``, ``"chunked prefill"`` or ``"decode"``.
        logits: Logits ``[V]``.
    """

    case: int
    token: int
    step: str
    logits: Tensor


class _Engine:
    """Scheduler and arena of one run."""

    def __init__(self, packed: Packed, cases: Cases, kv: Sequence[Sequence[LayerKV]]) -> None:
        self.packed, self.kv, self.ids = packed, kv, [c.ids for c in cases.all]
        self.prompts = [len(ids) - NEW for ids in self.ids]
        units = [p.rows for p in cases.prefixes] + [len(ids) + NEW for ids in self.ids]
        rows = RESERVED_ROWS + ROW_UNIT * sum(-(-n // ROW_UNIT) + 1 for n in units)
        table = torch.zeros(len(self.ids) + 1, max(map(len, self.ids)) + NEW, dtype=torch.int32)
        self.arena = packed.arena(rows, table.to(packed.model.device))
        self.scheduler = _rust.Scheduler(
            rows,
            len(self.ids),
            STEP_TOKENS,
            tile_rows=packed.backend.sizes.tokens,
            decode=packed.backend.decode,
        )
        for number, prefix in enumerate(cases.prefixes):
            self.scheduler.register_prefix(number, prefix.rows, prefix.pos_start, True)
            self._load(number)
        for number, case in enumerate(cases.all):
            prefixes = [] if case.prefix is None else [case.prefix]
            self.scheduler.add(number, prefixes, self.prompts[number], 1, NEW)
        self.done = list(self.prompts)  # tokens of each sequence so far
        self.chunked: set[int] = set()
        self.served: list[Served] = []

    def run(self) -> list[Served]:
        waiting = len(self.ids)
        while waiting:
            buffer = torch.empty(self.scheduler.buffer_len, dtype=torch.int32)
            header = self.scheduler.plan_step(buffer.numpy())
            if header.prefill is not None:
                self._prefill(buffer, header, Layout(*header.prefill))
            if header.decode is not None:
                self._decode(buffer, header, Layout(*header.decode))
            ended = [i for i in header.decode_ids if self.done[i] == len(self.ids[i])]
            self.scheduler.commit(ended)
            waiting -= len(ended)
        return self.served

    def _load(self, prefix: int) -> None:
        place = self.scheduler.load_prefix(prefix)
        assert place is not None
        row = place[0]
        for (arena_k, arena_v), (k, v) in zip(self.arena.layers, self.kv[prefix], strict=True):
            arena_k[row : row + len(k), :, : k.shape[2]] = k
            arena_v[row : row + len(v), :, : v.shape[2]] = v
        self.scheduler.prefix_ready(prefix)

    def _prefill(self, buffer: Tensor, header: _rust.StepHeader, layout: Layout) -> None:
        model, backend = self.packed.model, self.packed.backend
        plan = prefill_plan(buffer.to(model.device), layout, header.prefill_reach, self.arena, backend)
        chunk = host_table(buffer.numpy(), layout.views[0]["chunk"]).tolist()
        parts = list(zip(header.prefill_ids, chunk, strict=True))
        ids = torch.cat([self.ids[i][start : start + n] for i, (_, _, start, n) in parts])
        logits = packed_forward(model, plan, ids)
        ends = []
        for i, (_, _, start, n) in parts:
            if start:
                self.chunked.add(i)
            if start + n == self.prompts[i]:
                ends.append(i)
        for i, row in zip(ends, logits, strict=True):
            step = "chunked prefill" if i in self.chunked else "prefill"
            self.served.append(Served(i, self.prompts[i] - 1, step, row))

    def _decode(self, buffer: Tensor, header: _rust.StepHeader, layout: Layout) -> None:
        model, numbers = self.packed.model, header.decode_ids
        longest = int(host_table(buffer.numpy(), layout.views[0]["lens"]).max())
        plan = decode_plan(
            buffer.to(model.device), layout, header.decode_reach, longest, self.arena, self.packed.backend
        )
        logits = packed_forward(model, plan, torch.stack([self.ids[i][self.done[i]] for i in numbers]))
        for i, row in zip(numbers, logits, strict=True):
            self.served.append(Served(i, self.done[i], "decode", row))
            self.done[i] += 1
