"""`LoopDriver`, which runs an engine's loop in the caller's thread or in the engine's own thread."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

from prefixfast.engine.loop import Loop
from prefixfast.engine.output import RequestOutput
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.run_batch import run_batch, wait_for_tickets
from prefixfast.engine.ticket import Ticket, request_error
from prefixfast.engine.weights import applied_weights
from prefixfast.engine.worker import Worker
from prefixfast.errors import ConfigError
from prefixfast.io.progress import Progress
from prefixfast.model.base import Model
from prefixfast.model.process import check_not_exiting, check_same_process, model_lock, process_id
from prefixfast.prefix.tuned_weights import TunedWeights

BUSY_ERROR = (
    "this engine has just been closed or given a thread by submit; make another engine, or load the base again for the "
    "weights"
)
T = TypeVar("T")


class LoopDriver:
    """Owner of a loop. The loop runs in the caller's thread until the first request is submitted.

    Args:
        model: Base model.
        loop: Loop of the engine.
        num_threads: Number of torch's CPU threads, None for torch's setting.

    Attributes:
        worker: Engine's thread, None until the first request is submitted.
        lock: Lock of whoever runs the loop, or starts the worker. A thread that runs the loop has the guard of the base
            model before.
        owner: Id of the thread that runs the loop without a worker. Valid only while the lock is taken.
        next_number: Iterator over request numbers.
        closed: Whether the engine is closed.
        interrupted: Whether a job in a caller's thread was interrupted, or runs.
        on_result: Function that gets each result of `run` as soon as its request has ended, None for no function.
    """

    def __init__(self, model: Model, loop: Loop, num_threads: int | None) -> None:
        self.model, self.loop, self.num_threads = model, loop, num_threads
        self.worker: Worker | None = None
        self.lock = model_lock()
        self.owner: int | None = None
        self.process_id = process_id()
        self.next_number = itertools.count()
        self.closed = self.interrupted = False
        self.on_result: Callable[[Generation | BaseException], None] | None = None

    def check_open(self) -> None:
        """Raise `ConfigError` if the engine is closed."""
        if self.closed:
            msg = "this engine is closed; make a new one"
            raise ConfigError(msg)

    def check_callable(self, method: str, *, waits: bool = False) -> None:
        """Raise `ConfigError` if the engine is closed, or if the call could never return.

        Args:
            method: Name of the called method, for the error.
            waits: Whether the method waits for requests.
        """
        check_same_process(self.process_id, "engine")
        self.check_open()
        self.check_outside(method, waits=waits)

    def check_outside(self, method: str, *, waits: bool) -> None:
        """Raise `ConfigError` in code that the engine calls, where the method could never return.

        That is a logits processor, or a signal handler that interrupts a step. For a method that waits it is also a
        callback of a ticket, and a run with trained weights, for whose end the engine's thread waits.

        Args:
            method: Name of the called method, for the error.
            waits: Whether the method waits for requests or for the end of the engine's thread.
        """
        worker = self.worker
        in_worker = worker is not None and worker.is_current_thread()
        inline = self.owner == threading.get_ident() and self.lock.locked()
        if inline or (worker is not None and in_worker and worker.stepping):
            msg = (
                f"{method} was called inside a step of its own engine, by a logits processor or a signal handler; call "
                "it after the request has ended"
            )
            raise ConfigError(msg)
        if waits and in_worker:
            msg = (
                f"{method} cannot run in a callback of a ticket, which runs in the engine's own thread; use submit "
                "there, or another thread"
            )
            raise ConfigError(msg)
        if waits and worker is not None:
            self.model.guard.check_not_changing()

    def between_steps(self, method: str, job: Callable[[], T], weights: TunedWeights | None = None) -> T:
        """Run a function between two steps, in the thread that owns model and loop.

        Args:
            method: Name of the called method, for the error.
            job: Function that uses the model or the loop.
            weights: Trained weights that act in the base model meanwhile.

        Raises:
            ConfigError: If the engine is closed, in a logits processor, in a forked process, or with weights while an
                engine with a thread uses the base model.
        """
        self.check_callable(method)
        with self._turn(weights) as worker:
            if worker is None:
                return self._run_inline(job)
        return worker.between_steps(job)

    def submit(self, request: Request, *, wait: bool = False) -> Ticket:
        """Queue a request for the engine's thread, which is started by the first request.

        Args:
            request: Request.
            wait: Whether to wait while ``max_waiting`` requests are waiting (back-pressure).

        Raises:
            CapacityError: If ``max_waiting`` requests are waiting.
            ConfigError: If the engine is closed.
        """
        return self._start_worker().submit(next(self.next_number), request, wait=wait)

    def run(
        self, requests: list[Request], work: Progress, weights: TunedWeights | None = None
    ) -> list[Generation | BaseException]:
        """Run requests and wait for their results.

        Args:
            requests: Requests.
            work: Progress that counts the finished requests.
            weights: Trained weights that act in the base model meanwhile.

        Returns:
            Result or error of each request, in their order.

        Raises:
            ConfigError: If the engine is closed, or for weights while an engine with a thread uses the base model.
        """
        with self._turn(weights) as worker:
            if worker is None:
                return self._run_inline(lambda: self._run_batch(requests, work))
        return wait_for_tickets((partial(self.submit, r, wait=True) for r in requests), work)

    @contextlib.contextmanager
    def _turn(self, weights: TunedWeights | None) -> Iterator[Worker | None]:
        """Context manager in which this thread runs the loop, unless the engine's thread does, which is yielded.

        The guard of the base model comes before the lock. Nobody waits for the guard while it has the lock, so that
        threads that run engines inside each other's steps never wait for each other.
        """
        if self.worker is not None and weights is None:
            self.model.guard.check_not_changing()
            yield self.worker
            return
        # With weights no other thread runs the loop, and one that has the lock closes it or starts the worker.
        lock = self.lock if weights is None else _free(self.lock)
        with applied_weights(self.model, weights), lock:
            self.check_open()
            if weights is not None and self.worker is not None:
                raise ConfigError(BUSY_ERROR)
            yield self.worker

    def close(self) -> None:
        """End the engine's thread, cancel its requests, and release the arena. Waits for a `run` of another thread.

        A forked process has no such thread and releases its own references only. A second call completes a close that
        was interrupted.
        """
        self.closed = True
        if self.process_id != process_id():
            self.loop.close()
            return
        with self.lock:
            if self.worker is not None:
                self.worker.end()
            self.loop.close()

    def _run_batch(self, requests: list[Request], work: Progress) -> list[Generation | BaseException]:
        on_result = self.on_result

        def report(output: RequestOutput) -> None:
            assert on_result is not None
            on_result(self.to_result(output))

        numbered = [(next(self.next_number), r) for r in requests]
        outputs = run_batch(self.loop, numbered, work, None if on_result is None else report)
        try:  # all texts in one call, which is fast
            texts = iter(self._decode([s.token_ids for output in outputs for s in output.sequences]))
            return [output.to_generation([next(texts) for _ in output.sequences]) for output in outputs]
        except Exception:  # of one request's tokens or text
            return [self.to_result(output) for output in outputs]

    def _run_inline(self, job: Callable[[], T]) -> T:
        """Run a job in this thread, which has the lock. An interrupt can leave the loop in any state.

        Args:
            job: Function that uses the model or the loop. It leaves the loop intact if it raises an `Exception`.
        """
        check_not_exiting()
        self.owner = threading.get_ident()
        try:
            with torch.inference_mode(), _threads(self.num_threads):
                self._repair()
                self.interrupted = True
                try:
                    result = job()
                except Exception:
                    self.interrupted = False
                    raise
                self.interrupted = False
                return result
        finally:
            self.loop.end_run()
            self.owner = None

    def _repair(self) -> None:
        """Restart the loop if the last job was interrupted."""
        if self.interrupted or not self.loop.intact:
            self.loop.restart()
            self.interrupted = False

    def to_result(self, output: RequestOutput) -> Generation | BaseException:
        """Result, or error, of a request that has ended.

        Args:
            output: Output of the request.
        """
        try:
            return output.to_generation(self._decode([s.token_ids for s in output.sequences]))
        except Exception as e:  # for example of the task that cleans the text
            return request_error(e)

    def _start_worker(self) -> Worker:
        # Without the lock, since a callback of a ticket can submit while another thread closes the engine.
        if self.worker is not None:
            return self.worker
        with self.lock:
            self.check_open()
            if self.worker is None:
                self._repair()
                self.worker = Worker(self.loop, self.to_result, self.num_threads)
        return self.worker

    def _decode(self, tokens: list[list[int]]) -> list[str]:
        """Texts of token ids, empty for a base model without a tokenizer."""
        return self.model.tokenizer.decode(tokens) if self.model.tokenizer is not None else [""] * len(tokens)


@contextlib.contextmanager
def _free(lock: threading.Lock) -> Iterator[None]:
    """Context manager of a lock that raises `ConfigError` instead of waiting."""
    if not lock.acquire(blocking=False):
        raise ConfigError(BUSY_ERROR)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Context in which torch uses ``count`` CPU threads, None for torch's setting."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
