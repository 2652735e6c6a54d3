"""`Engine`: prefill once a request, decode all rows together, prefixes read in place. `generate` is an engine for one call.

Shape letters: R decode rows, N packed tokens, S requests of a step, H kv heads, D head dim.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from prefixfast import _rust
from prefixfast.config import EngineConfig, GenerationParams, unknown_option
from prefixfast.engine.arena import LONGEST_BY_DEFAULT, bytes_of_row, choose_rows, make_arena
from prefixfast.engine.request import Generation, Input, Request, make_requests, warn_about_defaults
from prefixfast.engine.select import Beam, Choice, Greedy
from prefixfast.errors import CapacityError, ConfigError, PrefixFastError, RequestError
from prefixfast.model import Model, borrowed, load
from prefixfast.plan import Arena, Plan, Sections, packed_tables, section
from prefixfast.prefix import Prefix
from prefixfast_kernels.tables import DecodeTables

logger = logging.getLogger(__name__)
KEPT_PREFIXES = 256  # on the host, beyond those that a call brings


class Engine:
    """Generates for requests with any mix of prefixes.

    Args:
        model: Hub id, folder, Hugging Face model (attached until `close`) or `Model`.
        config: Memory and batching.
        fields: Fields of `EngineConfig`, over ``config``.

    Raises:
        ConfigError: For options that do not fit.
    """

    def __init__(self, model: Any, *, config: EngineConfig | Mapping[str, Any] | None = None, **fields: Any) -> None:
        self.config = EngineConfig.make(config, **fields)
        self._own = not isinstance(model, Model)
        self.model = load(model)
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        """Arena, scheduler and per-row state."""
        self.max_model_len = min(self.config.max_model_len or LONGEST_BY_DEFAULT, self.model.max_positions)
        device, rows = self.model.device, self.config.max_num_seqs
        arena_rows = choose_rows(self.model, self.config, self.max_model_len)
        self.arena = make_arena(self.model, arena_rows, rows, self.max_model_len)
        use = self.model.backend
        self.scheduler = _rust.Scheduler(arena_rows, rows, self.config.max_num_batched_tokens, tile_rows=use.sizes.tokens, decode=use.decode)
        self.numbers: dict[str, int] = {}  # digest -> prefix number
        self.prefixes: dict[int, Prefix] = {}
        self.choosers: dict[int, Greedy | Beam] = {}
        self.eos = torch.tensor(_end_tokens(self.model), dtype=torch.int64, device=device)
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.beams_of_row, self.id_of_row = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.buffer = torch.zeros(0, dtype=torch.int32)
        self.longest = 0  # longest row so far
        self.ids = itertools.count()
        self.pending: list[tuple[int, int]] = []  # prefixes that the scheduler waits for
        self.closed = False
        warn_about_defaults(self.model)
        row_bytes = bytes_of_row(self.model)
        logger.info(
            "engine: %d rows of keys and values (%.0f MiB), %d decode rows, %d tokens each",
            arena_rows,
            arena_rows * row_bytes / 2**20,
            rows,
            self.max_model_len,
        )

    def generate(
        self, batch: Sequence[Input], prefixes: Any = None, *, params: GenerationParams | None = None, progress: bool | None = None, **fields: Any
    ) -> list[Generation]:
        """Generate for a batch.

        Args:
            batch: Strings, lists of token ids, or rows without their target.
            prefixes: One `Prefix` for all, one entry a request (None, a prefix, or a sequence that composes left to right), or a mapping for rows with a
                ``prefix`` key.
            params: How text is chosen.
            progress: Show a bar; None: when standard error is a terminal.
            fields: Fields of `GenerationParams`, over ``params``.

        Returns:
            One `Generation` a request, in order.

        Raises:
            RequestError: For a bad request, before any work.
            ConfigError: For arguments that do not fit.
            CapacityError: If a request can never fit the arena or the decode rows.
        """
        for name in fields:
            if name not in GenerationParams.names():
                raise ConfigError(unknown_option(name, GenerationParams.names(), "generate"))
        if self.closed:
            msg = "this engine is closed: make a new one"
            raise ConfigError(msg)
        call = GenerationParams.make(params, **fields)
        requests = {next(self.ids): r for r in make_requests(self.model, batch, prefixes, call, self.max_model_len)}
        for resolved in list({r.params: None for r in requests.values()})[:3]:
            logger.info("generating with %s", resolved)
        results: dict[int, tuple[list[int], float | None]] = {}
        self.longest = 0
        with torch.inference_mode(), _threads(self.config.num_threads):
            try:
                self._add(requests)
                with tqdm(total=len(requests), desc="generate", unit="request", disable=None if progress is None else not progress) as bar:
                    while self.scheduler.num_waiting or self.scheduler.num_running:
                        done = self._step(requests)
                        results |= done
                        bar.update(len(done))
            except BaseException:
                self._abandon(requests)
                raise
        self._forget()
        return self._generations(requests, results)

    def close(self) -> None:
        """Free the arena; a model that was given as an object is as it was."""
        if self._own:
            self.model.close()
        self._own, self.closed = False, True
        self.arena, self.prefixes, self.choosers = Arena([], torch.empty(0, dtype=torch.int32)), {}, {}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, requests: dict[int, Request]) -> None:
        for number, r in requests.items():
            own = [self._number(p) for p in r.prefixes]
            assert r.params.max_new_tokens is not None
            try:
                self.scheduler.add(number, own, len(r.ids), r.params.num_beams or 1, r.params.max_new_tokens)
            except RequestError as e:
                msg = f"request {r.index} can never run: {e}; raise max_num_seqs or kv_cache_memory, or lower max_new_tokens or num_beams"
                raise CapacityError(msg) from e

    def _number(self, prefix: Prefix) -> int:
        """The scheduler's number of a prefix; equal content has one number."""
        number = self.numbers.get(prefix.digest)
        if number is None:
            number = self.numbers[prefix.digest] = next(self.ids)
            self.scheduler.register_prefix(number, prefix.length, prefix.pos_start, prefix.window == "slide")
        self.prefixes[number] = self.prefixes.pop(number, prefix)  # the last one in the dictionary was used last
        return number

    def _abandon(self, requests: dict[int, Request]) -> None:
        """Drop what is left of a failed call, so that the engine stays usable."""
        self._finish_loads()
        with contextlib.suppress(PrefixFastError):  # there may be no step to end
            self.scheduler.commit([])
        for number in requests:
            self.scheduler.cancel(number)
        self.pending += self.scheduler.plan_step(self._out()).loads
        self._finish_loads()
        with contextlib.suppress(PrefixFastError):
            self.scheduler.commit([])

    def _finish_loads(self) -> None:
        """Copy the prefixes that the scheduler asked for; what an interrupt leaves is done at the next call."""
        while self.pending:
            number, row = self.pending[-1]
            self._load(self.prefixes[number], row)
            self.scheduler.prefix_ready(number)
            self.pending.pop()

    def _forget(self) -> None:
        """Let go of the prefixes that were not used for longest."""
        while len(self.prefixes) > KEPT_PREFIXES:
            number, prefix = next(iter(self.prefixes.items()))
            self.scheduler.forget_prefix(number)
            del self.prefixes[number], self.numbers[prefix.digest]

    def _out(self) -> np.ndarray:
        """The host buffer that the planner fills; a fresh one each step, since plans of earlier steps may still be read."""
        self.buffer = torch.empty(self.scheduler.buffer_len, dtype=torch.int32, pin_memory=self.model.device.type == "cuda")
        return self.buffer.numpy()

    def _step(self, requests: dict[int, Request]) -> dict[int, tuple[list[int], float | None]]:
        """One step of the scheduler: loads, prefills, decodes."""
        out = self._out()
        header = self.scheduler.plan_step(out)
        self.pending += header.loads
        self._finish_loads()
        tables = self.buffer.to(self.model.device, non_blocking=True)
        finished: dict[int, tuple[list[int], float | None]] = {}
        if header.prefill_sections is not None:
            finished |= self._prefill(out, tables, header.prefill_sections, header.prefill_reach, header.prefill_ids, requests)
        if header.decode_sections is not None:
            finished |= self._decode(out, tables, header.decode_sections, header.decode_reach)
        self.scheduler.commit(list(finished))
        return finished

    def _load(self, prefix: Prefix, row: int) -> None:
        for layer, kv in enumerate(self.arena.layers):
            for arena, x in zip(kv, "kv", strict=True):
                arena[row : row + prefix.length].copy_(prefix.kv[f"self.{layer}.{x}"])

    def _prefill(
        self, out: np.ndarray, tables: Tensor, places: Sections, reach: int, ids: list[int], requests: dict[int, Request]
    ) -> dict[int, tuple[list[int], float | None]]:
        """All prompts of the step in one packed forward, then their first tokens."""
        fill = section(tables, places["fill"]).long()
        self.arena.table[fill[:, 0], fill[:, 1]] = fill[:, 2].int()
        plan = Plan(
            section(tables, places["position_ids"])[None],
            self.model.backend,
            reach,
            packed=packed_tables(tables, places),
            arena=self.arena,
            slots=section(tables, places["slots"]),
            logits_at=section(tables, places["logits_idx"]).long(),
        )
        self.longest = max(self.longest, *(len(requests[i].ids) for i in ids))
        tokens = torch.from_numpy(np.concatenate([requests[i].ids for i in ids])).long().to(self.model.device)
        logits = self.model.forward(plan, tokens)
        rows = []
        for number, (row, beams, _, _) in zip(ids, _numpy(out, places["chunk"]).tolist(), strict=True):
            self.beams_of_row[row : row + beams], self.id_of_row[row : row + beams] = beams, number
            self._chooser(beams).start(row, requests[number].params)
            rows += [np.arange(row, row + beams)]
        beams_each = [len(r) for r in rows]
        repeated = logits.repeat_interleave(torch.tensor(beams_each, device=logits.device), 0) if max(beams_each) > 1 else logits
        return self._choose(repeated, np.concatenate(rows))

    def _decode(self, out: np.ndarray, tables: Tensor, places: Sections, reach: int) -> dict[int, tuple[list[int], float | None]]:
        """One token for every running row."""
        step = DecodeTables(*(section(tables, places[name]) for name in DecodeTables._fields))
        slots, rows = section(tables, places["slot"]), step.row.long()
        self.arena.table[rows, step.lens.long() - 1] = slots
        max_len = int(_numpy(out, places["lens"]).max())
        self.longest = max(self.longest, max_len)
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
        return self._choose(logits, _numpy(out, places["row"]).astype(np.int64))

    def _choose(self, logits: Tensor, rows: np.ndarray) -> dict[int, tuple[list[int], float | None]]:
        """Select tokens of ``rows`` ``[R]`` from ``logits`` ``[R, V]``; one pass for each number of beams in use."""
        finished: dict[int, tuple[list[int], float | None]] = {}
        beams = self.beams_of_row[rows]
        for k in np.unique(beams).tolist():
            mine = np.flatnonzero(beams == k)
            at = torch.from_numpy(rows[mine]).to(logits.device)
            chooser = self._chooser(k)
            choice = chooser.step(logits if len(mine) == len(rows) else logits[torch.from_numpy(mine).to(logits.device)], at[::k])
            self._advance(at, choice)
            for row in rows[mine][::k][choice.finished.cpu().numpy()].tolist():
                finished[int(self.id_of_row[row])] = chooser.result(row)
        return finished

    def _advance(self, rows: Tensor, choice: Choice) -> None:
        """Write the next tokens; a beam reorder is a permutation of slot-table rows, no key or value moves."""
        if choice.source is not None:
            used = self.longest  # entries beyond no row has yet
            self.arena.table[rows, :used] = self.arena.table[choice.source, :used]
        self.token[rows] = choice.tokens

    def _chooser(self, beams: int) -> Greedy | Beam:
        if beams not in self.choosers:
            size = (self.config.max_num_seqs, self.max_model_len, self.eos)
            self.choosers[beams] = Greedy(*size) if beams == 1 else Beam(beams, *size)
        return self.choosers[beams]

    def _generations(self, requests: dict[int, Request], results: dict[int, tuple[list[int], float | None]]) -> list[Generation]:
        end = set(self.eos.tolist())
        tokens = [results[i][0] for i in requests]
        texts = self.model.tokenizer.decode(tokens) if self.model.tokenizer is not None else [""] * len(tokens)
        out = []
        for (number, r), text in zip(requests.items(), texts, strict=True):
            ids, score = results[number]
            usage = {"prompt_tokens": len(r.ids), "completion_tokens": len(ids), "prefix_rows": sum(p.length for p in r.prefixes)}
            digest = "+".join(p.digest for p in r.prefixes) or None
            out.append(Generation(r.index, r.id, r.task.clean(text), ids, "stop" if ids and ids[-1] in end else "length", score, digest, usage))
        return out


def generate(
    batch: Sequence[Input], prefixes: Any = None, *, model: Any = None, params: GenerationParams | None = None, progress: bool | None = None, **fields: Any
) -> list[Generation]:
    """Generate for one batch of requests, each with its own prefixes; see `Engine.generate`.

    Args:
        batch: See `Engine.generate`.
        prefixes: See `Engine.generate`.
        model: The base; None: the one that the prefixes name.
        params: See `Engine.generate`.
        progress: See `Engine.generate`.
        fields: Fields of `GenerationParams` and `EngineConfig`.
    """
    known = (*GenerationParams.names(), *EngineConfig.names())
    for name in fields:
        if name not in known:
            raise ConfigError(unknown_option(name, known, "generate"))
    engine_fields = {k: v for k, v in fields.items() if k in EngineConfig.names()}
    with borrowed(model if model is not None else _base_of(prefixes)) as base, Engine(base, **engine_fields) as engine:
        return engine.generate(batch, prefixes, params=params, progress=progress, **{k: v for k, v in fields.items() if k not in engine_fields})


def _base_of(prefixes: Any) -> str:
    """The one base that these prefixes were made for."""
    entries = list(prefixes.values()) if isinstance(prefixes, Mapping) else list(prefixes) if isinstance(prefixes, Sequence) else [prefixes]
    flat = [p for e in entries for p in (e if isinstance(e, Sequence) else [e]) if isinstance(p, Prefix)]
    names = {str(p.base["name"]) for p in flat if p.base and p.base.get("name")}
    if len(names) != 1:
        msg = f"model: expected a base, or prefixes that name one, got {sorted(names) or 'none'}"
        raise ConfigError(msg)
    return names.pop()


def _end_tokens(model: Model) -> list[int]:
    """End tokens of the base's generation_config, else the tokenizer's."""
    found = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    if found is None and model.tokenizer is not None:
        found = model.tokenizer.eos_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _numpy(buffer: np.ndarray, place: tuple[int, int, int]) -> np.ndarray:
    offset, rows, cols = place
    return buffer[offset : offset + rows * cols].reshape(rows, cols) if cols else buffer[offset : offset + rows]


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
