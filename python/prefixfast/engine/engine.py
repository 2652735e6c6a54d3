"""`Engine`: many requests with any mix of prefixes over one frozen model, read in place."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from prefixfast.config import EngineConfig, GenerationParams, unknown_option
from prefixfast.data.encode import Input
from prefixfast.engine.explain import explain, memory_of
from prefixfast.engine.kv_arena import LONGEST_BY_DEFAULT
from prefixfast.engine.loop import Loop
from prefixfast.engine.output import Outcome
from prefixfast.engine.pinning import Residents
from prefixfast.engine.request import Generation, Request, failed, make_requests, one_by_one
from prefixfast.engine.run_batch import run_all, wait_all
from prefixfast.engine.sampling_params import warn_about_defaults
from prefixfast.engine.score import Score, score, target_ids
from prefixfast.engine.shared_prompts import SharedPrompts
from prefixfast.engine.stream import Deltas, Stream
from prefixfast.engine.ticket import Ticket
from prefixfast.engine.worker import Worker
from prefixfast.errors import ConfigError, PrefixFastError, RequestError
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.model.shared_base import check_base_fields
from prefixfast.store import PrefixStore

logger = logging.getLogger(__name__)
T = TypeVar("T")
BASE_FIELDS = ("dtype", "device", "revision", "backend")  # of EngineConfig: how a base is loaded


class Engine(Residents):
    """Generates for requests with any mix of prefixes, which come and go while others run.

    `generate` runs a batch in the caller's thread. `submit` and `agenerate` start a thread that owns the model from then on; `generate` goes through it too.

    Example:
        >>> with Engine(base, max_num_seqs=8) as engine:
        ...     now, scored = engine.generate(["2+2="], prefix, max_new_tokens=3)[0], engine.score(["2+2="], prefix, targets=["4"])[0]
        ...     ticket, stream = engine.submit("2+2=", prefix, max_new_tokens=3), engine.stream("2+2=", prefix, max_new_tokens=3)
        ...     "".join(stream) == ticket.result().text == now.text, scored.logprob < 0
        (True, True)

    Args:
        model: Hub id, folder, Hugging Face model (attached until `close`) or `Model`.
        store: Where prefixes that are given by name lie; a path is opened read-only.
        config: Memory and batching.
        fields: Fields of `EngineConfig`, over ``config``.

    Raises:
        ConfigError: For options that do not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        store: PrefixStore | str | Path | None = None,
        config: EngineConfig | Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.config = EngineConfig.make(config, **fields)
        self.store = PrefixStore(store, read_only=True) if isinstance(store, str | Path) else store
        self._own = not isinstance(model, Model)
        how = {name: getattr(self.config, name) for name in BASE_FIELDS}
        self.model = load(model, **how) if isinstance(model, str | Path) else load(model)
        self.seeds = np.random.default_rng(self.config.seed)
        self.worker: Worker | None = None
        self.lock = threading.Lock()  # held by whoever drives the loop, or starts the worker
        self.ids = itertools.count()
        self.closed = False
        try:
            check_base_fields(self.model, **how)
            self._allocate()
        except BaseException:
            self.closed = True
            if self._own:
                self.model.close()
            raise

    def _allocate(self) -> None:
        self.max_model_len = min(self.config.max_model_len or LONGEST_BY_DEFAULT, self.model.max_positions)
        self.ends = _end_tokens(self.model)
        if self.config.prepack and self.model.device.type == "cpu":
            self.model.prepack()
        self.loop = Loop(self.model, self.config, self.max_model_len, self.ends)
        self.shared = SharedPrompts(self.model, self.config.share_prompts)
        warn_about_defaults(self.model)
        logger.info(memory_of(self.model, self.loop, self.config))

    def generate(
        self,
        batch: Sequence[Input],
        prefixes: Any = None,
        *,
        params: GenerationParams | None = None,
        logits_processor: LogitsProcessorList | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
        **fields: Any,
    ) -> list[Generation]:
        """Generate for a batch.

        Args:
            batch: Strings, lists of token ids, or rows without their target.
            prefixes: One `Prefix` for all, one entry a request (None, a prefix, or a sequence that composes left to right), or a mapping for rows with a
                ``prefix`` key. With a store a prefix may be its name, and rows may name theirs.
            params: How text is chosen.
            logits_processor: transformers' or own processors for every request, after those that the parameters ask for. Each is called for every step and
                request by itself: a slow path.
            on_error: ``"return"``: a bad or failed request gives a `Generation` with its ``error``, the others run.
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
        if on_error not in ("raise", "return"):
            msg = f"on_error: expected 'raise' or 'return', got {on_error!r}"
            raise ConfigError(msg)
        requests, bad = self._requests(batch, prefixes, params, fields, logits_processor, lenient=on_error == "return")
        for resolved in list({replace(r.params, seed=None): None for r in requests})[:3]:
            logger.info("generating with %s", resolved)
        self._not_in_callback("generate")
        with tqdm(
            total=len(requests), desc="generate", unit="request", disable=None if progress is None else not progress
        ) as bar:
            results = self._results(requests, bar)
        if on_error == "raise":
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        ended = {r.index: result for r, result in zip(requests, results, strict=True)} | bad
        return [
            failed(i, item, found) if isinstance(found := ended[i], BaseException) else found
            for i, item in enumerate(batch)
        ]

    def submit(
        self,
        item: Input,
        prefix: Any = None,
        *,
        params: GenerationParams | None = None,
        logits_processor: LogitsProcessorList | None = None,
        tenant: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **fields: Any,
    ) -> Ticket:
        """Queue one request and return its `Ticket` at once; the engine's thread serves it beside all others.

        Only while another thread is inside `generate` on an engine that has no thread yet does it wait for that batch.

        Args:
            item: A string, a list of token ids, or a row without its target.
            prefix: None, a `Prefix`, a name in the store, or a sequence of them that composes left to right.
            params: How text is chosen.
            logits_processor: See `generate`.
            tenant: Who asks; tenants of one priority get equal service. None: whoever uses the same (first) prefix.
            priority: Higher goes first.
            timeout: Seconds after which the request ends with what it has, ``finish_reason="deadline"``.
            fields: Fields of `GenerationParams`, over ``params``.

        Raises:
            RequestError: For a bad request.
            CapacityError: If ``max_waiting`` requests wait already.
            ConfigError: For arguments that do not fit.
        """
        return self._submit(
            self._request(item, prefix, params, logits_processor, fields),
            tenant=tenant,
            priority=priority,
            timeout=timeout,
        )

    def _request(
        self,
        item: Input,
        prefix: Any,
        params: GenerationParams | None,
        processors: LogitsProcessorList | None,
        fields: Mapping[str, Any],
    ) -> Request:
        (request,), _ = self._requests([item], None if prefix is None else [prefix], params, fields, processors)
        return request

    def _submit(
        self, request: Request, *, tenant: str | None = None, priority: int = 0, timeout: float | None = None
    ) -> Ticket:
        if timeout is not None and not timeout >= 0:
            msg = f"timeout: expected seconds from 0 on, got {timeout!r}"
            raise ConfigError(msg)
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._started().submit(
            next(self.ids), replace(request, tenant=tenant, priority=priority, deadline=deadline)
        )

    def stream(
        self,
        item: Input,
        prefix: Any = None,
        *,
        params: GenerationParams | None = None,
        logits_processor: LogitsProcessorList | None = None,
        tenant: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **fields: Any,
    ) -> Stream:
        """`submit` as a `Stream`: iterate over it (or ``async for``); joined, the pieces are the text of its ``generation``. Arguments are those of `submit`.

        Raises:
            RequestError: For a bad request, beams or several texts.
            ConfigError: If the base has no tokenizer.
        """
        request = self._request(item, prefix, params, logits_processor, fields)
        if request.rows > 1:
            msg = f"request 0: stream: expected one text without beams, got {request.rows} rows; use submit"
            raise RequestError(msg, index=0)
        deltas = Deltas(self.model.require_tokenizer().stream(), strip=request.task.strip)
        return Stream(
            lambda watch: self._submit(
                replace(request, watch=watch), tenant=tenant, priority=priority, timeout=timeout
            ),
            deltas,
        )

    def astream(self, item: Input, prefix: Any = None, **options: Any) -> Stream:
        """The same `Stream` as of `stream`, for ``async for``. Arguments are those of `stream`."""
        return self.stream(item, prefix, **options)

    def cancel(self, request: Ticket | Stream) -> None:
        """End a submitted ``request`` at the next step; its result is what it has."""
        request.cancel()

    def score(
        self,
        batch: Sequence[Input],
        prefixes: Any = None,
        *,
        targets: Sequence[str | list[int]] | None = None,
        end_token: bool = False,
    ) -> list[Score]:
        """Log-probabilities of targets (natural log), one `Score` a request.

        Args:
            batch: As in `generate`; rows may have their target.
            prefixes: As in `generate`.
            targets: One a request, text or token ids; None: the rows' own.
            end_token: Score the end token after each target too, as training does.

        Raises:
            RequestError: For a bad request or target.
            ConfigError: For arguments that do not fit.
        """
        requests = self._checked(batch, prefixes, None)
        wanted = target_ids(self.model, batch, requests, targets, end_token=end_token)
        return self._between_steps(lambda: score(self.model, requests, wanted, self.config.max_num_batched_tokens))

    async def agenerate(self, item: Input, prefix: Any = None, **options: Any) -> Generation:
        """`submit` and wait for the `Generation` without blocking the event loop; a cancelled task cancels its request. Arguments are those of `submit`."""
        if (
            self.config.share_prompts or self.lock.locked()
        ):  # may wait for the engine's thread, or for a generate in another one
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
        names = (
            "steps",
            "prefill_tokens",
            "continued_prefills",
            "decode_steps",
            "decoded_rows",
            "loads",
            "evictions",
            "cancelled",
            "expired",
        )
        return {name: counts[name] for name in names} | {"reads": self.loop.residency.loader.read}

    def explain(self) -> dict[str, str]:
        """Which way each operator of this engine goes and why no faster one, and whether weights are packed."""
        return explain(self.model, self.loop, self.config)

    def close(self) -> None:
        """Free the arena and end the thread (what has not ended is cancelled); a model that was given as an object is as it was.

        Waits for a `generate` that another thread drives.

        Raises:
            ConfigError: In a callback of a ticket, which the engine's thread runs.
        """
        if self.closed:
            return
        self._not_in_callback("close")
        self.closed = True
        with self.lock:
            if self.worker is not None:
                self.worker.close()
            self.loop.close()
        if self._own:
            self.model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(
        self,
        batch: Sequence[Input],
        prefixes: Any,
        params: GenerationParams | None,
        fields: Mapping[str, Any],
        processors: LogitsProcessorList | None = None,
        *,
        lenient: bool = False,
    ) -> tuple[list[Request], dict[int, BaseException]]:
        """Checked requests with their seeds, and what is wrong with the others; without ``lenient`` that is raised."""
        for name in fields:
            if name not in GenerationParams.names():
                raise ConfigError(unknown_option(name, GenerationParams.names(), "generate"))
        call, bad = GenerationParams.make(params, **fields), dict[int, BaseException]()
        try:
            requests = self._checked(batch, prefixes, call, processors)
        except PrefixFastError as e:
            if not lenient or isinstance(e, ConfigError):
                raise
            requests, bad = one_by_one(batch, prefixes, lambda one, own: self._checked(one, own, call, processors))
        drawn = [r.params.do_sample and r.params.seed is None for r in requests]
        requests = [
            replace(r, params=replace(r.params, seed=int(self.seeds.integers(2**62)))) if draw else r
            for r, draw in zip(requests, drawn, strict=True)
        ]
        return self._between_steps(lambda: self.shared.split(requests)) if self.config.share_prompts else requests, bad

    def _checked(
        self,
        batch: Sequence[Input],
        prefixes: Any,
        call: GenerationParams | None,
        processors: LogitsProcessorList | None = None,
    ) -> list[Request]:
        self._open()
        if processors is not None and not (isinstance(processors, list) and all(map(callable, processors))):
            msg = f"logits_processor: expected a LogitsProcessorList or a list of processors, got {type(processors).__name__}"
            raise ConfigError(msg)
        return make_requests(self.model, batch, prefixes, call, self.max_model_len, self.store, processors)

    def _not_in_callback(self, what: str) -> None:
        if self.worker is not None and threading.current_thread() is self.worker.thread:
            msg = f"{what} cannot run in a callback of a ticket, which the engine's own thread runs: use submit there, or another thread"
            raise ConfigError(msg)

    def _between_steps(self, job: Callable[[], T]) -> T:
        """Run something that uses the model or the loop, between two steps, in the thread that owns them."""
        with self.lock, torch.inference_mode(), _threads(self.config.num_threads):
            self._open()
            if self.worker is None:
                return job()
        return self.worker.call(job)

    def _open(self) -> None:
        if self.closed:
            msg = "this engine is closed: make a new one"
            raise ConfigError(msg)

    def _started(self) -> Worker:
        if self.worker is not None:  # without the lock: a callback of a ticket may submit while another thread closes
            return self.worker
        with self.lock:
            self._open()
            if self.worker is None:
                self.worker = Worker(self.loop, self._delivered, self.config.num_threads)
        return self.worker

    def _results(self, requests: list[Request], bar: Any) -> list[Generation | BaseException]:
        with self.lock, torch.inference_mode(), _threads(self.config.num_threads):
            if self.worker is None:
                ended = run_all(self.loop, [(next(self.ids), r) for r in requests], bar)
                texts = iter(self._texts([text.ids for outcome in ended for text in outcome.texts]))
                return [outcome.finish([next(texts) for _ in outcome.texts]) for outcome in ended]
        return wait_all((partial(self._started().submit, next(self.ids), r, wait=True) for r in requests), bar)

    def _delivered(self, outcome: Outcome) -> Generation | BaseException:
        return outcome.finish(self._texts([text.ids for text in outcome.texts]))

    def _texts(self, tokens: list[list[int]]) -> list[str]:
        return self.model.tokenizer.decode(tokens) if self.model.tokenizer is not None else [""] * len(tokens)


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
