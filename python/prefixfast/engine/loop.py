"""`Loop`, the steps of one engine: load prefixes, prefill, decode and choose tokens as the scheduler plans.

One thread at a time runs the loop. With captured decode steps the loop runs one step ahead. A step is planned and
started before the tokens of the previous step are read, so that the device does not wait for the host. A request that
ended with an end token is then decoded once more, and the extra token is dropped. Steps with beams are read at once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.plan import Arena
from prefixfast.config import EngineConfig
from prefixfast.engine.arena_sites import ArenaSites
from prefixfast.engine.cuda_graphs import eager_reason
from prefixfast.engine.decode_batch import DecodeBatch, StepTokens
from prefixfast.engine.kv_arena import bytes_per_row, encoder_folds, make_arena, num_arena_rows
from prefixfast.engine.output import NO_TOKEN_ERROR, OutputSequence, RequestOutput, RunningSequences
from prefixfast.engine.prefix_cache import PrefixCache
from prefixfast.engine.prefix_loader import FinishedLoad, PrefixLoader
from prefixfast.engine.queue_request import queue_request
from prefixfast.engine.request import Request
from prefixfast.engine.sampling_params import num_output_tokens
from prefixfast.engine.step_runner import StepRunner
from prefixfast.engine.ticket import request_error
from prefixfast.errors import RequestError
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.weights import recorded_state
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix


class Loop:
    """KV arena, scheduler, prefix cache and decode rows of an engine.

    An error in the work for one request ends this request. An error of a forward ends the requests of the forward.
    Waiting requests go on. After any other error, or an interrupt, `restart` must be called.

    Args:
        model: Base model.
        config: Options of the engine.
        max_model_len: Largest number of prompt and generated tokens of a request.
        end_ids: End tokens. Tokens that the base model does not have are ignored.

    Attributes:
        intact: Whether no `restart` has failed.
    """

    def __init__(self, model: Model, config: EngineConfig, max_model_len: int, end_ids: list[int]) -> None:
        self.model, self.max_model_len = model, max_model_len
        rows = config.max_num_seqs
        arena_rows = num_arena_rows(model, config, max_model_len)
        self.arena = make_arena(model, arena_rows, rows + 1, max_model_len)  # the last decode row is the padding row
        self.eager_reason = eager_reason(model, config)
        self.run_ahead = self.eager_reason is None
        prefix_rows = None if config.prefix_memory is None else config.prefix_memory // bytes_per_row(model)
        self._new_scheduler = partial(
            _rust.Scheduler,
            arena_rows,
            rows,
            config.max_num_batched_tokens,
            tile_rows=model.backend.sizes.tokens,
            prefix_rows=prefix_rows,
            decode=model.backend.decode,
            pad_decode=self.run_ahead,
            encoder_folds=encoder_folds(model),
        )
        host_dtype = DTYPES.get(config.prefix_dtype, model.dtype)
        loader = PrefixLoader(ArenaSites(self.arena, model.sites), config.host_prefix_memory, host_dtype)
        self.scheduler = self._new_scheduler()
        self.prefix_cache = PrefixCache(self.scheduler, loader, model.handle.infix.place)
        self.intact = True
        self.max_waiting = config.max_waiting
        self.batch = DecodeBatch(self.arena.table, [e for e in end_ids if 0 <= e < num_output_tokens(model)])
        self.outputs = RunningSequences(model, self.batch.end_ids)
        self.run, self.running = contextlib.ExitStack(), False  # a run lasts from the first request to the last
        self.requests: dict[int, Request] = {}  # waiting and running requests, by number
        self.first_row: dict[int, int] = {}  # first decode row of requests that have tokens
        self.unread: list[StepTokens] = []  # started steps whose tokens were not read yet
        self.committed: set[int] = set()  # requests that ended in the scheduler, but whose last token was not read yet
        self.errors: dict[int, BaseException] = {}  # errors of requests that were cancelled for them
        self.counts: Counter[str] = Counter()
        self.runner = StepRunner(model, self.arena, self.batch, max_model_len, self.counts)
        self.compiled, self.captured = config.compile_decode, (recorded_state(model.hf), model.guard.acting)
        if self.run_ahead:
            self.runner.capture(compiled=self.compiled)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.requests)

    @property
    def queue_full(self) -> bool:
        """Whether ``max_waiting`` requests are waiting."""
        return self.scheduler.num_waiting >= self.max_waiting

    def add(self, number: int, request: Request) -> None:
        """Queue a request.

        Args:
            number: Number that no unfinished request has.
            request: Request.

        Raises:
            CapacityError: If the request can never run.
        """
        prefixes = [self.prefix_cache.number_of(p) for p in request.prefixes]
        queue_request(self.scheduler, number, request, prefixes)
        self.requests[number] = request

    def cancel(self, number: int) -> None:
        """End a request at the next step with the tokens that it has. A request that has ended is not changed.

        Args:
            number: Number of the request.
        """
        self.scheduler.cancel(number)

    def set_pinned(self, prefix: Prefix | StoredPrefix, pinned: bool) -> None:
        """Pin a prefix and load it if there is room, or unpin it.

        Args:
            prefix: Prefix, or its entry in a store.
            pinned: Whether the prefix is evicted only if no other prefix can be evicted.
        """
        loads, evictions = self.prefix_cache.set_pinned(prefix, pinned)
        self.counts.update(loads=loads, evictions=evictions)

    def evict(self, digest: str) -> bool:
        """Forget a prefix and set its arena rows to zero, as soon as no request uses it.

        If the prefix is being loaded for no request, the call waits for the load.

        Args:
            digest: Digest of the prefix.

        Returns:
            Whether the prefix is gone already.
        """
        gone = self.prefix_cache.evict(digest)
        while not gone and self.prefix_cache.loader.num_loading and not self.prefix_cache.num_requests(digest):
            self._cancel_unloadable(self.prefix_cache.finish_loads(wait=True))
            gone = self.prefix_cache.evict(digest)
        return gone

    def step(self) -> dict[int, RequestOutput]:
        """Run one step of the scheduler.

        Returns:
            Outputs of the requests that have ended, by request number.
        """
        if not self.running:
            self._begin_run()
        self._cancel_unloadable(self.prefix_cache.finish_loads(wait=False))
        # A new buffer in each step, since the device may still read the plans of earlier steps.
        pinned = self.model.device.type == "cuda"
        buffer = torch.empty(self.scheduler.buffer_len, dtype=torch.int32, pin_memory=pinned)
        header = self.scheduler.plan_step(buffer.numpy(), time.monotonic())
        ended = self._end_dropped(header.cancelled, header.expired)
        dropped = {*header.cancelled, *header.expired}
        self.prefix_cache.start_loads(header.loads)
        self.counts.update(
            steps=1,
            loads=len(header.loads),
            evictions=len(header.evictions),
            cancelled=len(header.cancelled),
            expired=len(header.expired),
        )
        started: list[StepTokens] = []
        if header.prefill is not None:
            started += self._prefill(buffer, header)
        if header.decode is not None:
            try:
                started += self.runner.decode(buffer, header)
            except Exception as e:
                self._fail(header.decode_ids, e)
        elif header.prefill is None and not self.unread:
            self._cancel_unloadable(self.prefix_cache.finish_loads(wait=True))
        self._cancel_failed_processors()
        over = {number for step in started for number in step.at_limit}
        if self.run_ahead and all(step.num_beams == 1 for step in started):
            to_read, self.unread = self.unread, started
        else:
            to_read, self.unread = self.unread + started, []
        ended |= self._read(to_read, ended)
        over |= ended.keys()
        self.scheduler.commit(sorted(over - self.committed - dropped))
        self.committed = (self.committed | over) - ended.keys()
        for number in ended:
            self._discard(number)
        self.prefix_cache.evict_pending()
        self.prefix_cache.trim(busy=bool(self.requests))
        if not self.requests:
            self.unread = []
            self.end_run()
        return ended

    def restart(self) -> None:
        """Drop all requests and forget all prefixes but the pinned ones, after an error or an interrupt anywhere.

        Nothing that the error can have left half changed is used again. The rows of forgotten prefixes are set to zero,
        and pinned prefixes are loaded again.
        """
        self.intact = False
        old = self.prefix_cache
        old.loader.restart()
        old.clear_rows()
        scheduler = self._new_scheduler()
        cache = PrefixCache(scheduler, old.loader, old.infix_place)
        for prefix in old.pinned_prefixes():
            cache.set_pinned(prefix, True)
        self.scheduler, self.prefix_cache = scheduler, cache
        self.batch.processors.end(np.arange(len(self.batch.next_token)))
        self._clear_requests()
        self.intact = True

    def _begin_run(self) -> None:
        """Begin a run with the weights as they are now."""
        self.run.enter_context(self.model.run())
        self.running = True
        if self.run_ahead and (state := (recorded_state(self.model.hf), self.model.guard.acting)) != self.captured:
            self.runner.capture(compiled=self.compiled)  # a captured graph reads the places of the old tensors
            self.captured = state

    def end_run(self) -> None:
        """End the run, so that the next request finds weights that were changed meanwhile."""
        self.running = False
        self.run.close()

    def _clear_requests(self) -> None:
        self.end_run()
        for state in (self.requests, self.first_row, self.outputs, self.unread, self.committed, self.errors):
            state.clear()
        self.batch.processors.errors.clear()

    def close(self) -> None:
        """Release the arena and the CUDA graphs, and end the loader's thread."""
        self.prefix_cache.loader.close()
        self.runner.close()
        self._clear_requests()
        self.arena = Arena([], torch.empty(0, dtype=torch.int32))

    def _prefill(self, buffer: Tensor, header: _rust.StepHeader) -> list[StepTokens]:
        """Prefill of a step; returns the first tokens of the requests whose prompt is complete."""
        try:
            chosen, first_rows, failed = self.runner.prefill(buffer, header, self.requests)
        except Exception as e:
            self._fail(header.prefill_ids, e)
            return []
        for number, error in failed.items():
            self._fail([number], error)
        self.first_row |= first_rows
        for number in first_rows:
            if not self.requests[number].is_beam_search:
                try:
                    self.outputs.start(number, self.requests[number])
                except Exception as e:
                    self._fail([number], e)
        return chosen

    def _fail(self, numbers: Iterable[int], error: BaseException) -> None:
        """End requests with an error at the next step."""
        for number in numbers:
            if number in self.requests:
                self.errors.setdefault(number, request_error(error))
                self.scheduler.cancel(number)

    def _cancel_unloadable(self, loads: list[FinishedLoad]) -> None:
        """Cancel the requests whose prefix could not be loaded."""
        for load in loads:
            if load.error is not None:
                digest = self.prefix_cache.prefixes[load.number].digest
                users = [n for n, r in self.requests.items() if any(p.digest == digest for p in r.prefixes)]
                self._fail(users, load.error)

    def _cancel_failed_processors(self) -> None:
        """Cancel the requests whose own logits processors raised an error."""
        for row, error in self.batch.processors.errors.items():
            self._fail([int(self.batch.request_number[row])], error)
        self.batch.processors.errors.clear()

    def _discard(self, number: int) -> None:
        """Remove the state of a request that has ended."""
        if (row := self.first_row.pop(number, None)) is not None:
            self.batch.processors.end(np.arange(row, row + self.requests[number].num_rows))
        self.requests.pop(number, None)
        self.errors.pop(number, None)
        self.outputs.discard(number)

    def _end_dropped(self, cancelled: list[int], expired: list[int]) -> dict[int, RequestOutput]:
        """Outputs of the requests that the scheduler dropped, and of requests whose unread tokens end them."""
        if not cancelled and not expired:
            return {}
        unread, self.unread = self.unread, []
        ended = self._read(unread, {})
        for reason, numbers in (("cancelled", cancelled), ("deadline", expired)):
            ended |= {number: self._cut(number, reason) for number in numbers if number not in ended}
        return ended

    def _cut(self, number: int, reason: str) -> RequestOutput:
        """Output of a request that the scheduler dropped."""
        row, request = self.first_row.get(number), self.requests[number]
        if (error := self.errors.get(number)) is not None:
            for prefix in list(self.prefix_cache.load_errors):
                self.prefix_cache.forget(prefix)
            return RequestOutput(request, [], error)
        if row is not None and request.is_beam_search:
            sequences = [OutputSequence(ids, reason, score) for ids, score in self._best_beams(row, request)]
        else:
            sequences = self.outputs.cut(number, reason)
        return RequestOutput(request, sequences)

    def _best_beams(self, row: int, request: Request) -> list[tuple[list[int], float]]:
        """Token ids and scores of the beams to return."""
        return self.batch.beam_search(request.num_rows).best(row, request.params.num_return_sequences or 1)

    def _read(self, steps: list[StepTokens], known: Mapping[int, RequestOutput]) -> dict[int, RequestOutput]:
        """Wait for the tokens of started steps, and append them to the sequences.

        Args:
            steps: Started steps.
            known: Requests that are known to have ended.

        Returns:
            Outputs of further requests that have ended.
        """
        ended: dict[int, RequestOutput] = {}
        for step in steps:
            values = step.values.values()
            logprobs = step.logprobs.read(values) if step.logprobs is not None else {}
            for place, (number, row, value) in enumerate(zip(step.numbers, step.rows, values, strict=True)):
                request = self.requests.get(number)
                # The request ended in an earlier step, whose tokens were read after this step was started.
                if request is None or number in ended or number in known:
                    continue
                try:
                    if step.num_beams > 1:
                        sequences = self._finished_beams(row, request) if value else None
                    else:
                        first = self.first_row[number]
                        self.outputs.append(number, request, row - first, value, logprobs.get(place))
                        sequences = self.outputs.sequences[number] if self.outputs.finished(number) else None
                except Exception as e:  # of the request's stream, its stop strings or its beams
                    self.errors.setdefault(number, request_error(e))
                    sequences = []
                if sequences is not None:
                    # A logits processor can have failed at the last token.
                    error = self.errors.get(number)
                    ended[number] = RequestOutput(request, sequences if error is None else [], error)
        return ended

    def _finished_beams(self, row: int, request: Request) -> list[OutputSequence]:
        """Sequences of a beam search that has ended."""
        end_ids, beams = self.batch.end_ids, self._best_beams(row, request)
        if not all(score > -math.inf for _, score in beams):  # also NaN
            raise RequestError(NO_TOKEN_ERROR)
        return [OutputSequence(ids, "stop" if ids and ids[-1] in end_ids else "length", score) for ids, score in beams]
