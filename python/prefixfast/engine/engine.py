"""`Engine`: many requests with any mix of prefixes over one frozen model, read in place. `generate` is an engine for one call."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from prefixfast import ops
from prefixfast.config import EngineConfig, GenerationParams, unknown_option
from prefixfast.engine.arena import LONGEST_BY_DEFAULT, bytes_of_row
from prefixfast.engine.loop import Loop, Outcome
from prefixfast.engine.request import Generation, Input, Request, make_requests, warn_about_defaults
from prefixfast.engine.shared import SharedPrompts
from prefixfast.engine.worker import Ticket, Worker
from prefixfast.errors import ConfigError
from prefixfast.model import Model, borrowed, load
from prefixfast.prefix import Prefix
from prefixfast.store import PrefixStore

logger = logging.getLogger(__name__)


class Engine:
    """Generates for requests with any mix of prefixes, which come and go while others run.

    `generate` runs a batch in the caller's thread. `submit` and `agenerate` start a thread that owns the model from then on; `generate` goes through it too.

    Args:
        model: Hub id, folder, Hugging Face model (attached until `close`) or `Model`.
        store: Where prefixes that are given by name lie.
        config: Memory and batching.
        fields: Fields of `EngineConfig`, over ``config``.

    Raises:
        ConfigError: For options that do not fit.
    """

    def __init__(self, model: Any, *, store: PrefixStore | None = None, config: EngineConfig | Mapping[str, Any] | None = None, **fields: Any) -> None:
        self.config = EngineConfig.make(config, **fields)
        self.store = store
        self._own = not isinstance(model, Model)
        self.model = load(model)
        self.worker: Worker | None = None
        self.lock = threading.Lock()  # held by whoever drives the loop, or starts the worker
        self.ids = itertools.count()
        self.closed = False
        try:
            self._allocate()
        except BaseException:
            self.closed = True
            if self._own:
                self.model.close()
            raise

    def _allocate(self) -> None:
        self.max_model_len = min(self.config.max_model_len or LONGEST_BY_DEFAULT, self.model.max_positions)
        self.ends = _end_tokens(self.model)
        packed = self.model.prepack() if self.config.prepack and self.model.device.type == "cpu" else None
        self.loop = Loop(self.model, self.config, self.max_model_len, self.ends)
        self.shared = SharedPrompts(self.model, self.config.share_prompts)
        warn_about_defaults(self.model)
        rows = len(self.loop.arena.layers[0][0])
        logger.info(
            "engine: weights %.0f MiB, packed copies %.0f MiB; %d rows of keys and values %.0f MiB; stored prefixes on the host at most %.0f MiB; "
            "%d decode rows of %d tokens",
            sum(p.numel() * p.element_size() for p in self.model.hf.parameters()) / 2**20,
            (packed.nbytes if packed is not None else 0) / 2**20,
            rows,
            rows * bytes_of_row(self.model) / 2**20,
            self.config.host_prefix_memory / 2**20,
            self.config.max_num_seqs,
            self.max_model_len,
        )

    def generate(
        self, batch: Sequence[Input], prefixes: Any = None, *, params: GenerationParams | None = None, progress: bool | None = None, **fields: Any
    ) -> list[Generation]:
        """Generate for a batch.

        Args:
            batch: Strings, lists of token ids, or rows without their target.
            prefixes: One `Prefix` for all, one entry a request (None, a prefix, or a sequence that composes left to right), or a mapping for rows with a
                ``prefix`` key. With a store a prefix may be its name, and rows may name theirs.
            params: How text is chosen.
            progress: Show a bar; None: when standard error is a terminal.
            fields: Fields of `GenerationParams`, over ``params``.

        Returns:
            One `Generation` a request, in order.

        Raises:
            RequestError: For a bad request, before any work.
            UnknownPrefixError: For a name that the store does not have, before any work.
            ConfigError: For arguments that do not fit.
            CapacityError: If a request can never fit the arena or the decode rows.
        """
        requests = self._requests(batch, prefixes, params, fields)
        for resolved in list({r.params: None for r in requests})[:3]:
            logger.info("generating with %s", resolved)
        with tqdm(total=len(requests), desc="generate", unit="request", disable=None if progress is None else not progress) as bar:
            with self.lock, torch.inference_mode(), _threads(self.config.num_threads):
                if self.worker is None:
                    return self._inline(requests, bar)
            return self._through_worker(requests, bar)

    def submit(
        self,
        item: Input,
        prefix: Any = None,
        *,
        params: GenerationParams | None = None,
        tenant: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **fields: Any,
    ) -> Ticket:
        """Queue one request and return at once; the engine's thread serves it beside all others.

        Args:
            item: A string, a list of token ids, or a row without its target.
            prefix: None, a `Prefix`, a name in the store, or a sequence of them that composes left to right.
            params: How text is chosen.
            tenant: Who asks; tenants of one priority get equal service. None: whoever uses the same (first) prefix.
            priority: Higher goes first.
            timeout: Seconds after which the request ends with what it has, ``finish_reason="deadline"``.
            fields: Fields of `GenerationParams`, over ``params``.

        Raises:
            RequestError: For a bad request.
            CapacityError: If ``max_waiting`` requests wait already.
            ConfigError: For arguments that do not fit.
        """
        (request,) = self._requests([item], None if prefix is None else [prefix], params, fields)
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._started().submit(next(self.ids), replace(request, tenant=tenant, priority=priority, deadline=deadline))

    async def agenerate(self, item: Input, prefix: Any = None, **options: Any) -> Generation:
        """`submit` and wait without blocking the event loop; a cancelled task cancels its request."""
        if self.config.share_prompts:  # may wait for the engine's thread
            submitted = asyncio.get_running_loop().run_in_executor(None, lambda: self.submit(item, prefix, **options))
            try:
                ticket = await asyncio.shield(submitted)
            except asyncio.CancelledError:
                submitted.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
                raise
        else:
            ticket = self.submit(item, prefix, **options)
        try:
            return await ticket
        except BaseException:
            ticket.cancel()
            raise

    def stats(self) -> dict[str, int]:
        """Counts since the engine was made: steps, prefill_tokens, decoded_rows, loads, evictions, reads (of files), cancelled, expired, ..."""
        counts = self.loop.counts
        names = ("steps", "prefill_tokens", "continued_prefills", "decode_steps", "decoded_rows", "loads", "evictions", "cancelled", "expired")
        return {name: counts[name] for name in names} | {"reads": self.loop.residency.loader.read}

    def explain(self) -> dict[str, str]:
        """Which way each operator of this engine goes and why no faster one, and whether weights are packed."""
        model = self.model
        found = {op: way for op, way in ops.explain(model.backend, model.device, model.dtype, model.layers[0].head_dim).items() if op != "cross_entropy"}
        called = self.loop.why_called or (None if self.loop.graphs is None or self.loop.graphs.capture else "capture failed, see the log")
        compiled = ", compiled" if self.config.compile_decode else ""
        found["decode step"] = f"called; {called}" if called else f"captured CUDA graphs by rows, planned one step ahead{compiled}"
        packed = model.packed
        why = "prepack=False" if packed is None and model.device.type == "cpu" else "packing is for CPUs" if packed is None else packed.why_not
        return found | {"linear": "packed for this CPU (oneDNN)" if why is None else f"torch; {why}"}

    def close(self) -> None:
        """Free the arena and end the thread (what has not ended is cancelled); a model that was given as an object is as it was."""
        if self.closed:
            return
        self.closed = True
        if self.worker is not None:
            self.worker.close()
        self.loop.close()
        if self._own:
            self.model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(self, batch: Sequence[Input], prefixes: Any, params: GenerationParams | None, fields: Mapping[str, Any]) -> list[Request]:
        for name in fields:
            if name not in GenerationParams.names():
                raise ConfigError(unknown_option(name, GenerationParams.names(), "generate"))
        if self.closed:
            msg = "this engine is closed: make a new one"
            raise ConfigError(msg)
        requests = make_requests(self.model, batch, prefixes, GenerationParams.make(params, **fields), self.max_model_len, self.store)
        if not self.config.share_prompts:
            return requests
        with self.lock, torch.inference_mode(), _threads(self.config.num_threads):
            if self.worker is None:
                return self.shared.split(requests)
        return self.worker.call(lambda: self.shared.split(requests))

    def _started(self) -> Worker:
        with self.lock:
            if self.worker is None:
                self.worker = Worker(self.loop, self._generation, self.config.num_threads)
        return self.worker

    def _inline(self, requests: list[Request], bar: Any) -> list[Generation]:
        """Drive the loop in this thread."""
        waiting = deque((next(self.ids), r) for r in requests)
        order = [number for number, _ in waiting]
        ended: dict[int, Outcome] = {}
        try:
            while waiting or self.loop.busy:
                while waiting and not self.loop.full:
                    self.loop.add(*waiting.popleft())
                done = self.loop.step()
                ended |= done
                bar.update(len(done))
        except BaseException:
            self.loop.abandon()
            raise
        texts = self._texts([ended[number].token_ids for number in order])
        return [self._generation(ended[number], text) for number, text in zip(order, texts, strict=True)]

    def _through_worker(self, requests: list[Request], bar: Any) -> list[Generation]:
        tickets: list[Ticket] = []
        try:
            tickets += (self._started().submit(next(self.ids), request, wait=True) for request in requests)
            out = []
            for ticket in tickets:
                out.append(ticket.result())
                bar.update()
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return out

    def _texts(self, tokens: list[list[int]]) -> list[str]:
        return self.model.tokenizer.decode(tokens) if self.model.tokenizer is not None else [""] * len(tokens)

    def _generation(self, outcome: Outcome, text: str | None = None) -> Generation:
        if outcome.error is not None:
            raise outcome.error
        r, ids = outcome.request, outcome.token_ids
        text = self._texts([ids])[0] if text is None else text
        own = r.prefixes[: -1 if r.shared else None]  # a shared leading text is part of the prompt
        usage = {"prompt_tokens": len(r.ids) + r.shared, "completion_tokens": len(ids), "prefix_rows": sum(p.length for p in own)}
        digest = "+".join(p.digest for p in own) or None
        return Generation(r.index, r.id, r.task.clean(text), ids, outcome.reason, outcome.score, digest, usage)


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


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
