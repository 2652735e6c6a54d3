"""One engine's steps: what the scheduler plans is loaded, prefilled, decoded and chosen from. One thread at a time.

With captured decode steps the loop runs one step ahead: a step is planned and started before the tokens of the one before are read, so that the device does
not wait for the host; a request that ended by an end token is decoded once more, for nothing. Beams are always read at once.

Shape letters: R decode rows, N packed tokens, S requests of a step, H kv heads, D head dim.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.plan import Arena, Layout, decode_plan, host_table, prefill_plan
from prefixfast.config import EngineConfig
from prefixfast.engine.cuda_graphs import DecodeGraphs, Result, why_not
from prefixfast.engine.decode_batch import Chosen, Rows
from prefixfast.engine.kv_arena import bytes_of_row, choose_rows, make_arena
from prefixfast.engine.output import Outcome, StopStrings, Text
from prefixfast.engine.prefix_cache import Residency
from prefixfast.engine.prefix_loader import Loaded, Loader
from prefixfast.engine.request import Request, TokenLogprob
from prefixfast.engine.transfer import to_device
from prefixfast.errors import CapacityError, PrefixFastError, RequestError
from prefixfast.model.base import DTYPES, Model
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix

UNBOUNDED = 2**30  # of a captured step: any sliding window may cut something


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
        self.arena = make_arena(model, arena_rows, rows + 1, max_model_len)  # the last row stands for nothing
        use = model.backend
        self.why_called = why_not(model, config)
        self.ahead = self.why_called is None
        prefix_rows = None if config.prefix_memory is None else config.prefix_memory // bytes_of_row(model)
        self.scheduler = _rust.Scheduler(
            arena_rows,
            rows,
            config.max_num_batched_tokens,
            tile_rows=use.sizes.tokens,
            prefix_rows=prefix_rows,
            decode=use.decode,
            pad_decode=self.ahead,
        )
        dead = {"row": rows, "slot": arena_rows - 1, "lens": 1}
        self.graphs = (
            DecodeGraphs(self._run_static, dead, device, compiled=config.compile_decode) if self.ahead else None
        )
        kept_as = DTYPES.get(config.prefix_dtype, model.dtype)
        self.residency = Residency(
            self.scheduler, Loader(self.arena.layers, model.layers, config.host_prefix_memory, kept_as)
        )
        self.max_waiting = config.max_waiting
        self.rows = Rows(
            self.arena.table, [e for e in eos if 0 <= e < model.vocab_size]
        )  # what the base cannot say is looked up nowhere
        self.buffer = torch.zeros(0, dtype=torch.int32)
        self.requests: dict[int, Request] = {}
        self.first_row: dict[int, int] = {}  # of requests that have tokens
        self.texts: dict[int, list[Text]] = {}  # of requests without beams, as far as they were read
        self.stops: dict[int, list[StopStrings]] = {}
        self.started: list[Chosen] = []  # not read yet
        self.retired: set[int] = set()  # the scheduler knows that they have ended, their last token was not read yet
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
        rows, most = request.rows, request.params.max_new_tokens
        try:
            self.scheduler.add(
                number,
                own,
                len(request.ids),
                rows,
                most,
                tenant=tenant,
                priority=request.priority,
                deadline=request.deadline,
            )
        except RequestError as e:
            why = str(e).split(" can never run: ")[-1]
            msg = f"request {request.index} can never run: {why}; raise max_num_seqs or kv_cache_memory, or lower max_new_tokens or num_beams"
            raise CapacityError(msg) from e
        self.requests[number] = request

    def cancel(self, number: int) -> None:
        """End a request at the next step with what it has; one that has ended is let be."""
        self.scheduler.cancel(number)

    def keep(self, prefix: Prefix | StoredPrefix, kept: bool) -> None:
        """See `Residency.keep`."""
        loads, evictions = self.residency.keep(prefix, kept)
        self.counts.update(loads=loads, evictions=evictions)

    def evict(self, digest: str) -> bool:
        """See `Residency.evict`; a prefix on its way that nobody waits for is waited for."""
        done = self.residency.evict(digest)
        while not done and self.residency.loader.under_way and not self.residency.users(digest):
            self._fail(self.residency.arrived(wait=True))
            done = self.residency.evict(digest)
        return done

    def step(self) -> dict[int, Outcome]:
        """One step of the scheduler: what has ended, by number."""
        self._fail(self.residency.arrived(wait=False))
        self.buffer = torch.empty(
            self.scheduler.buffer_len, dtype=torch.int32, pin_memory=self.model.device.type == "cuda"
        )
        out = self.buffer.numpy()  # a fresh one each step, since plans of earlier steps may still be read
        header = self.scheduler.plan_step(out, time.monotonic())
        ended = self._drop(header.cancelled, header.expired)
        dropped = {*header.cancelled, *header.expired}
        self.residency.begin(header.loads)
        self.counts.update(
            steps=1,
            loads=len(header.loads),
            evictions=len(header.evictions),
            cancelled=len(header.cancelled),
            expired=len(header.expired),
        )
        chosen = []
        prefill, decode = header.prefill, header.decode
        if prefill is not None:
            chosen += self._prefill(out, Layout(*prefill), header.prefill_reach, header.prefill_ids)
        if decode is not None:
            chosen += self._decode(out, Layout(*decode), header.decode_reach)
        elif prefill is None and not self.started:
            self._fail(self.residency.arrived(wait=True))
        self._fail_rows()
        over = {number for c in chosen for number in c.full}
        ahead = self.ahead and all(c.beams == 1 for c in chosen)
        read, self.started = (self.started, chosen) if ahead else (self.started + chosen, [])
        ended |= self._read(read, ended)
        over |= {number for number, outcome in ended.items() if outcome.texts[0].reason in ("stop", "length")}
        self.scheduler.commit(sorted(over - self.retired - dropped))
        self.retired = (self.retired | over) - ended.keys()
        for number in ended:
            if (row := self.first_row.get(number)) is not None:
                self.rows.rules.end(np.arange(row, row + self.requests[number].rows))
            for kept in (self.requests, self.first_row, self.texts, self.stops):
                kept.pop(number, None)
        self.residency.sweep()
        self.residency.trim(busy=bool(self.requests))
        if not self.requests:
            self.started = []
        return ended

    def abandon(self) -> None:
        """Drop everything after an error in the middle of a step, so that the loop stays usable."""
        self._fail(self.residency.arrived(wait=True))
        with contextlib.suppress(PrefixFastError):  # there may be no step to end
            self.scheduler.commit([])
        for number in self.requests:
            self.scheduler.cancel(number)
        self.residency.begin(
            self.scheduler.plan_step(torch.empty(self.scheduler.buffer_len, dtype=torch.int32).numpy()).loads
        )
        while self.residency.loader.under_way:
            self.residency.arrived(wait=True)
        with contextlib.suppress(PrefixFastError):
            self.scheduler.commit([])
        for kept in (self.requests, self.first_row, self.texts, self.stops, self.started, self.retired, self.failed):
            kept.clear()

    def close(self) -> None:
        """Free the arena and the graphs."""
        self.residency.loader.close()
        self.graphs = None
        self.arena = Arena([], torch.empty(0, dtype=torch.int32))

    def _fail(self, loads: list[Loaded]) -> None:
        """Cancel the requests whose prefix could not be loaded."""
        for load in loads:
            digest = self.residency.prefixes[load.number].digest
            for number, request in self.requests.items():
                if any(p.digest == digest for p in request.prefixes) and load.error is not None:
                    self.failed[number] = load.error
                    self.scheduler.cancel(number)

    def _fail_rows(self) -> None:
        """Cancel the requests whose own processors raised something."""
        for row, error in self.rows.rules.failed.items():
            number = int(self.rows.number[row])
            if number in self.requests:
                self.failed[number] = error
                self.scheduler.cancel(number)
        self.rows.rules.failed.clear()

    def _drop(self, cancelled: list[int], expired: list[int]) -> dict[int, Outcome]:
        """Outcomes of the requests that the scheduler dropped, and of those that turn out to have ended before."""
        if not cancelled and not expired:
            return {}
        started, self.started = self.started, []
        ended = self._read(started, {})
        for why, numbers in (("cancelled", cancelled), ("deadline", expired)):
            ended |= {number: self._cut(number, why) for number in numbers if number not in ended}
        return ended

    def _cut(self, number: int, why: str) -> Outcome:
        """The outcome of a request that the scheduler dropped."""
        error = self.failed.pop(number, None)
        for broken in list(self.residency.broken) if error is not None else []:
            self.residency.drop(broken)
        row, request = self.first_row.get(number), self.requests[number]
        if row is not None and request.search:
            return Outcome(request, [Text(ids, why, score) for ids, score in self._best(row, request)], error)
        texts = self.texts.get(number) or [Text()]
        for text in texts:
            text.reason = text.reason or why
        return Outcome(request, texts, error)

    def _best(self, row: int, request: Request) -> list[tuple[list[int], float]]:
        """Tokens and scores of a beam search's best texts."""
        return self.rows.beam(request.rows).result(row, request.params.num_return_sequences or 1)

    def _prefill(self, out: np.ndarray, layout: Layout, reach: int, ids: list[int]) -> list[Chosen]:
        """The prompt tokens of the step in one packed forward, then the first tokens of the prompts that end in it."""
        tables = self.buffer[: layout.end].to(self.model.device, non_blocking=True)
        plan = prefill_plan(tables, layout, reach, self.arena, self.model.backend)
        chunks = list(zip(ids, host_table(out, layout.views[0]["chunk"]).tolist(), strict=True))
        prompts = np.concatenate([self.requests[number].ids[start : start + n] for number, (_, _, start, n) in chunks])
        logits = self.model.forward(plan, to_device(prompts, self.model.device))
        self.counts.update(prefill_tokens=len(prompts), continued_prefills=int(plan.key_slots is not None))
        rows = []
        for number, (row, _, start, n) in chunks:
            request = self.requests[number]
            if start + n == len(request.ids):
                self.first_row[number] = row
                rows.append(self.rows.start(number, request, row))
                if not request.search:
                    self._begin(number, request)
        if not rows:
            return []
        each = [len(r) for r in rows]
        repeated = logits[to_device(np.repeat(np.arange(len(rows)), each), logits.device)] if max(each) > 1 else logits
        return self.rows.choose(repeated, np.concatenate(rows), max(len(self.requests[number].ids) for number in ids))

    def _begin(self, number: int, request: Request) -> None:
        """A request without beams gets its first tokens in this step."""
        self.texts[number] = [Text() for _ in range(request.rows)]
        if strings := request.params.stop_strings:
            tokenizer = self.model.require_tokenizer()
            special = frozenset(i for i, text in tokenizer.special_texts.items() if any(s in text for s in strings))
            self.stops[number] = [StopStrings(tokenizer.stream(), strings, special) for _ in range(request.rows)]

    def _decode(self, out: np.ndarray, layout: Layout, reach: int) -> list[Chosen]:
        """One token for every running row."""
        first = layout.views[0]
        lens, rows = host_table(out, first["lens"]), host_table(out, first["row"]).astype(np.int64)
        rows = rows[rows < len(self.rows.token) - 1]  # without those that stand for nothing
        alone = bool(self.rows.plain[rows].all())
        self.counts.update(decode_steps=1, decoded_rows=len(rows))
        if self.graphs is not None:
            logits, tokens = self.graphs.step(self.buffer, layout, choose=alone)
        else:
            tables = self.buffer[: layout.end].to(self.model.device, non_blocking=True)
            logits, tokens = self._run(tables, layout, choose=alone, reach=reach, max_len=int(lens.max()))
        if tokens is not None:
            return [self.rows.chosen(tokens[: len(rows)], rows, 1)]
        return self.rows.choose(logits[: len(rows)], rows, int(lens.max()))

    def _run_static(self, tables: Tensor, layout: Layout, choose: bool) -> Result:
        return self._run(tables, layout, choose=choose, reach=UNBOUNDED, max_len=self.max_model_len)

    def _run(self, tables: Tensor, layout: Layout, *, choose: bool, reach: int, max_len: int) -> Result:
        """The device's part of a decode step: logits, and with ``choose`` tokens of rows without beams."""
        plan = decode_plan(tables, layout, reach, max_len, self.arena, self.model.backend)
        assert plan.decode is not None
        rows = plan.decode[0].row.long()
        logits = self.model.forward(plan, self.rows.token[rows])
        if not choose:
            return logits, None
        tokens = self.rows.token[rows] = self.rows.greedy.step(logits, rows).tokens
        return logits, tokens

    def _read(self, started: list[Chosen], known: Mapping[int, Outcome]) -> dict[int, Outcome]:
        """Wait for what steps have chosen: the requests that have ended with it, beside those that are ``known`` to have."""
        ended: dict[int, Outcome] = {}
        for chosen in started:
            values = chosen.values.values()
            told = chosen.told.read(values) if chosen.told is not None else {}
            for place, (number, row, value) in enumerate(zip(chosen.numbers, chosen.rows, values, strict=True)):
                request = self.requests.get(number)
                if (
                    request is None or number in ended or number in known
                ):  # it ended in an earlier step; this one was started before that was read
                    continue
                if chosen.beams == 1:
                    self._token(number, request, row - self.first_row[number], value, told.get(place))
                    if all(text.reason for text in self.texts[number]):
                        ended[number] = Outcome(request, self.texts[number])
                elif value:
                    best = self._best(row, request)
                    ended[number] = Outcome(
                        request,
                        [Text(t, "stop" if t and t[-1] in self.rows.ends else "length", score) for t, score in best],
                    )
        return ended

    def _token(self, number: int, request: Request, part: int, token: int, told: TokenLogprob | None) -> None:
        """A token of one text of a request; a text that has ended waits for the others of its request."""
        text = self.texts[number][part]
        if text.reason is not None:
            return
        text.add(token, self.rows.ends, request.params.max_new_tokens or 1)
        if told is not None:
            text.logprobs.append(told)
        if number in self.stops and token not in self.rows.ends and self.stops[number][part].found(token):
            text.reason = "stop"
        if request.watch is not None and part == 0:
            request.watch(token)


def _tenant(name: str) -> int:
    """A number for a named tenant, below those of prefixes."""
    return -2 - int.from_bytes(hashlib.blake2b(name.encode("utf8", "surrogatepass"), digest_size=7).digest())
