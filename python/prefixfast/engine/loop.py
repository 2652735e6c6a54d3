"""One engine's steps: what the scheduler plans is loaded, prefilled, decoded and chosen from. One thread at a time.

Shape letters: R decode rows, N packed tokens, S requests of a step, H kv heads, D head dim.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.config import EngineConfig
from prefixfast.engine.arena import choose_rows, make_arena
from prefixfast.engine.loader import Loaded, Loader
from prefixfast.engine.request import Request
from prefixfast.engine.residency import Residency
from prefixfast.engine.select import Beam, Choice, Greedy
from prefixfast.errors import CapacityError, PrefixFastError, RequestError
from prefixfast.model import Model
from prefixfast.plan import Arena, Plan, Sections, packed_tables, section
from prefixfast_kernels.tables import DecodeTables


@dataclass(frozen=True)
class Outcome:
    """The end of a request.

    Attributes:
        request: Which one.
        token_ids: What was generated, the end token included.
        score: Of beam search.
        reason: ``"stop"`` (end token), ``"length"``, ``"cancelled"`` or ``"deadline"``.
        error: Why it failed, None if it did not.
    """

    request: Request
    token_ids: list[int]
    score: float | None
    reason: str
    error: BaseException | None = None


class Loop:
    """Arena, scheduler and per-row state.

    Args:
        model: The base.
        config: Memory and batching.
        max_model_len: Longest prompt and generation.
        eos: End tokens.
    """

    def __init__(self, model: Model, config: EngineConfig, max_model_len: int, eos: list[int]) -> None:
        self.model, self.max_model_len = model, max_model_len
        rows, device = config.max_num_seqs, model.device
        arena_rows = choose_rows(model, config, max_model_len)
        self.arena = make_arena(model, arena_rows, rows, max_model_len)
        use = model.backend
        self.scheduler = _rust.Scheduler(arena_rows, rows, config.max_num_batched_tokens, tile_rows=use.sizes.tokens, decode=use.decode)
        self.residency = Residency(self.scheduler, Loader(self.arena.layers, config.host_prefix_memory))
        self.max_waiting = config.max_waiting
        self.choosers: dict[int, Greedy | Beam] = {}
        self.eos, self.ends = torch.tensor(eos, dtype=torch.int64, device=device), set(eos)
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.beams_of_row, self.id_of_row = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.buffer = torch.zeros(0, dtype=torch.int32)
        self.requests: dict[int, Request] = {}
        self.first_row: dict[int, int] = {}  # of requests that have tokens
        self.failed: dict[int, BaseException] = {}  # cancelled because a prefix could not be read
        self.counts: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.requests)

    @property
    def full(self) -> bool:
        """Whether no more requests may wait."""
        return self.scheduler.num_waiting >= self.max_waiting

    def add(self, number: int, request: Request) -> None:
        """Queue a request under a number of the caller's.

        Raises:
            CapacityError: If it can never run.
        """
        own = [self.residency.number(p) for p in request.prefixes]
        assert request.params.max_new_tokens is not None
        tenant = _tenant(request.tenant) if request.tenant is not None else own[0] if own else -1
        beams, most = request.params.num_beams or 1, request.params.max_new_tokens
        try:
            self.scheduler.add(number, own, len(request.ids), beams, most, tenant=tenant, priority=request.priority, deadline=request.deadline)
        except RequestError as e:
            msg = f"request {request.index} can never run: {e}; raise max_num_seqs or kv_cache_memory, or lower max_new_tokens or num_beams"
            raise CapacityError(msg) from e
        self.requests[number] = request

    def cancel(self, number: int) -> None:
        """End a request at the next step with what it has; one that has ended is let be."""
        self.scheduler.cancel(number)

    def step(self) -> dict[int, Outcome]:
        """One step of the scheduler: what has ended, by number."""
        self._fail(self.residency.arrived(wait=False))
        self.buffer = torch.empty(self.scheduler.buffer_len, dtype=torch.int32, pin_memory=self.model.device.type == "cuda")
        out = self.buffer.numpy()  # a fresh one each step, since plans of earlier steps may still be read
        header = self.scheduler.plan_step(out, time.monotonic())
        ended = {number: self._cut(number, why) for why, ids in (("cancelled", header.cancelled), ("deadline", header.expired)) for number in ids}
        self.residency.begin(header.loads)
        self.counts.update(steps=1, loads=len(header.loads), evictions=len(header.evictions), cancelled=len(header.cancelled), expired=len(header.expired))
        tables = self.buffer.to(self.model.device, non_blocking=True)
        if header.prefill_sections is not None:
            ended |= self._prefill(out, tables, header.prefill_sections, header.prefill_reach, header.prefill_ids)
        if header.decode_sections is not None:
            ended |= self._decode(out, tables, header.decode_sections, header.decode_reach)
        elif header.prefill_sections is None:
            self._fail(self.residency.arrived(wait=True))
        self.scheduler.commit([number for number, outcome in ended.items() if outcome.reason in ("stop", "length")])
        for number in ended:
            del self.requests[number]
            self.first_row.pop(number, None)
        if not self.requests:
            self.residency.trim()
        return ended

    def abandon(self) -> None:
        """Drop everything after an error in the middle of a step, so that the loop stays usable."""
        self._fail(self.residency.arrived(wait=True))
        with contextlib.suppress(PrefixFastError):  # there may be no step to end
            self.scheduler.commit([])
        for number in self.requests:
            self.scheduler.cancel(number)
        self.residency.begin(self.scheduler.plan_step(torch.empty(self.scheduler.buffer_len, dtype=torch.int32).numpy()).loads)
        while self.residency.loader.under_way:
            self.residency.arrived(wait=True)
        with contextlib.suppress(PrefixFastError):
            self.scheduler.commit([])
        self.requests, self.first_row, self.failed = {}, {}, {}

    def close(self) -> None:
        """Free the arena."""
        self.residency.loader.close()
        self.arena = Arena([], torch.empty(0, dtype=torch.int32))

    def _fail(self, loads: list[Loaded]) -> None:
        """Cancel the requests whose prefix could not be loaded."""
        for load in loads:
            digest = self.residency.prefixes[load.number].digest
            for number, request in self.requests.items():
                if any(p.digest == digest for p in request.prefixes) and load.error is not None:
                    self.failed[number] = load.error
                    self.scheduler.cancel(number)

    def _cut(self, number: int, why: str) -> Outcome:
        """The outcome of a request that the scheduler dropped."""
        error = self.failed.pop(number, None)
        for broken in list(self.residency.broken) if error is not None else []:
            self.residency.drop(broken)
        row = self.first_row.get(number)
        if row is None:
            return Outcome(self.requests[number], [], None, why, error)
        tokens, score = self._chooser(int(self.beams_of_row[row])).result(row)
        return Outcome(self.requests[number], tokens, score, why, error)

    def _prefill(self, out: np.ndarray, tables: Tensor, places: Sections, reach: int, ids: list[int]) -> dict[int, Outcome]:
        """The prompt tokens of the step in one packed forward, then the first tokens of the prompts that end in it."""
        fill = section(tables, places["fill"]).long()
        self.arena.table[fill[:, 0], fill[:, 1]] = fill[:, 2].int()
        continued = places["key_slots"][1] > 0
        plan = Plan(
            section(tables, places["position_ids"])[None],
            self.model.backend,
            reach,
            packed=packed_tables(tables, places),
            arena=self.arena,
            slots=section(tables, places["slots"]),
            key_slots=section(tables, places["key_slots"]) if continued else None,
            logits_at=section(tables, places["logits_idx"]).long(),
        )
        chunks = list(zip(ids, host_view(out, places["chunk"]).tolist(), strict=True))
        prompts = np.concatenate([self.requests[number].ids[start : start + n] for number, (_, _, start, n) in chunks])
        logits = self.model.forward(plan, torch.from_numpy(prompts).long().to(self.model.device))
        self.counts.update(prefill_tokens=len(prompts), continued_prefills=int(continued))
        rows = []
        for number, (row, beams, start, n) in chunks:
            if start + n == len(self.requests[number].ids):
                self.beams_of_row[row : row + beams], self.id_of_row[row : row + beams] = beams, number
                self.first_row[number] = row
                self._chooser(beams).start(row, self.requests[number].params)
                rows.append(np.arange(row, row + beams))
        if not rows:
            return {}
        each = [len(r) for r in rows]
        repeated = logits.repeat_interleave(torch.tensor(each, device=logits.device), 0) if max(each) > 1 else logits
        return self._choose(repeated, np.concatenate(rows), max(len(self.requests[number].ids) for number in ids))

    def _decode(self, out: np.ndarray, tables: Tensor, places: Sections, reach: int) -> dict[int, Outcome]:
        """One token for every running row."""
        step = DecodeTables(*(section(tables, places[name]) for name in DecodeTables._fields))
        slots, rows = section(tables, places["slot"]), step.row.long()
        self.arena.table[rows, step.lens.long() - 1] = slots
        max_len = int(host_view(out, places["lens"]).max())
        plan = Plan(
            section(tables, places["position_ids"])[None],
            self.model.backend,
            reach,
            decode=step,
            arena=self.arena,
            slots=slots,
            max_len=max_len,
        )
        logits = self.model.forward(plan, self.token[rows])
        self.counts.update(decode_steps=1, decoded_rows=len(rows))
        return self._choose(logits, host_view(out, places["row"]).astype(np.int64), max_len)

    def _choose(self, logits: Tensor, rows: np.ndarray, longest: int) -> dict[int, Outcome]:
        """Select tokens of ``rows`` ``[R]`` of at most ``longest`` keys from ``logits`` ``[R, V]``; one pass for each number of beams in use."""
        ended: dict[int, Outcome] = {}
        beams = self.beams_of_row[rows]
        for k in np.unique(beams).tolist():
            mine = np.flatnonzero(beams == k)
            at = torch.from_numpy(rows[mine]).to(logits.device)
            chooser = self._chooser(k)
            choice = chooser.step(logits if len(mine) == len(rows) else logits[torch.from_numpy(mine).to(logits.device)], at[::k])
            self._advance(at, choice, longest)
            for row in rows[mine][::k][choice.finished.cpu().numpy()].tolist():
                tokens, score = chooser.result(row)
                number, why = int(self.id_of_row[row]), "stop" if tokens and tokens[-1] in self.ends else "length"
                ended[number] = Outcome(self.requests[number], tokens, score, why)
        return ended

    def _advance(self, rows: Tensor, choice: Choice, longest: int) -> None:
        """Write the next tokens; a beam reorder is a permutation of slot-table rows, no key or value moves."""
        if choice.source is not None:
            self.arena.table[rows, :longest] = self.arena.table[choice.source, :longest]
        self.token[rows] = choice.tokens

    def _chooser(self, beams: int) -> Greedy | Beam:
        if beams not in self.choosers:
            size = (len(self.token), self.max_model_len, self.eos)
            self.choosers[beams] = Greedy(*size) if beams == 1 else Beam(beams, *size)
        return self.choosers[beams]


def _tenant(name: str) -> int:
    """A number for a named tenant, below those of prefixes."""
    return -2 - int.from_bytes(hashlib.blake2b(name.encode("utf8", "surrogatepass"), digest_size=7).digest())


def host_view(buffer: np.ndarray, place: tuple[int, int, int]) -> np.ndarray:
    """One table of the planner's buffer on the host."""
    offset, rows, cols = place
    return buffer[offset : offset + rows * cols].reshape(rows, cols) if cols else buffer[offset : offset + rows]
