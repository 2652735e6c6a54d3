"""Prefill and decode steps of the proof over a KV arena, through the plans of the engine.

Shape letters: H kv heads, D head dim, P prefix rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.plan import LayerKV, Layout, decode_plan, host_table, prefill_plan
from prefixfast.model.packed_forward import packed_forward
from prefixfast.model.proof.cases import NEW, Cases
from prefixfast.model.proof.packed import PackedModel

RESERVED_ROWS = 80  # smallest arena of the scheduler, which keeps 64 of these rows free
ROW_UNIT = 16  # the scheduler hands out arena rows in units of this size
STEP_TOKENS = 28  # tokens of a step; the prompt of the long text is longer, so that it is filled over two steps


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


@torch.no_grad()
def serve(packed: PackedModel, cases: Cases, kv: Sequence[Sequence[LayerKV]]) -> list[Served]:
    """Logits of all sequences from prefill and decode steps.

    Args:
        packed: Attached model.
        cases: Sequences. The last tokens of each are given to decode steps.
        kv: Keys and values ``[P, H, D]`` by layer of each prefix.
    """
    return _Engine(packed, cases, kv).run()


class _Engine:
    """Scheduler and arena of one run."""

    def __init__(self, packed: PackedModel, cases: Cases, kv: Sequence[Sequence[LayerKV]]) -> None:
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
