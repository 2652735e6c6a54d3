"""`LoopDriver`, which runs an engine's loop in the caller's thread or in the engine's own thread."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from prefixfast.engine.loop import Loop
from prefixfast.engine.output import RequestOutput
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.run_batch import run_batch, wait_for_tickets
from prefixfast.engine.ticket import Ticket
from prefixfast.engine.worker import Worker
from prefixfast.errors import ConfigError
from prefixfast.model.base import Model

T = TypeVar("T")


class LoopDriver:
    """Owner of a loop. The loop runs in the caller's thread until the first request is submitted.

    Args:
        model: Base model.
        loop: Loop of the engine.
        num_threads: Number of torch's CPU threads, None for torch's setting.

    Attributes:
        worker: Engine's thread, None until the first request is submitted.
        lock: Lock of whoever runs the loop, or starts the worker.
        next_number: Iterator over request numbers.
        closed: Whether the engine is closed.
    """

    def __init__(self, model: Model, loop: Loop, num_threads: int | None) -> None:
        self.model, self.loop, self.num_threads = model, loop, num_threads
        self.worker: Worker | None = None
        self.lock = threading.Lock()
        self.next_number = itertools.count()
        self.closed = False

    def check_open(self) -> None:
        """Raise `ConfigError` if the engine is closed."""
        if self.closed:
            msg = "this engine is closed; make a new one"
            raise ConfigError(msg)

    def check_not_in_callback(self, method: str) -> None:
        """Raise `ConfigError` in a callback of a ticket, which runs in the engine's own thread.

        Args:
            method: Name of the called method, for the error.
        """
        if self.worker is not None and threading.current_thread() is self.worker.thread:
            msg = (
                f"{method} cannot run in a callback of a ticket, which runs in the engine's own thread; use submit "
                "there, or another thread"
            )
            raise ConfigError(msg)

    def between_steps(self, job: Callable[[], T]) -> T:
        """Run a function between two steps, in the thread that owns model and loop.

        Args:
            job: Function that uses the model or the loop.

        Raises:
            ConfigError: If the engine is closed.
        """
        with self.lock, torch.inference_mode(), _threads(self.num_threads):
            self.check_open()
            if self.worker is None:
                return job()
        return self.worker.between_steps(job)

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

    def run(self, requests: list[Request], bar: Any) -> list[Generation | BaseException]:
        """Run requests and wait for their results.

        Args:
            requests: Requests.
            bar: Progress bar, with a method ``update``.

        Returns:
            Result or error of each request, in their order.
        """
        with self.lock, torch.inference_mode(), _threads(self.num_threads):
            if self.worker is None:
                outputs = run_batch(self.loop, [(next(self.next_number), r) for r in requests], bar)
                texts = iter(self._decode([s.token_ids for output in outputs for s in output.sequences]))
                return [output.to_generation([next(texts) for _ in output.sequences]) for output in outputs]
        return wait_for_tickets((partial(self.submit, r, wait=True) for r in requests), bar)

    def close(self) -> None:
        """End the engine's thread, cancel its requests, and release the arena. Waits for a `run` of another thread."""
        self.closed = True
        with self.lock:
            if self.worker is not None:
                self.worker.close()
            self.loop.close()

    def to_result(self, output: RequestOutput) -> Generation | BaseException:
        """Result, or error, of a request that has ended.

        Args:
            output: Output of the request.
        """
        return output.to_generation(self._decode([s.token_ids for s in output.sequences]))

    def _start_worker(self) -> Worker:
        # Without the lock, since a callback of a ticket can submit while another thread closes the engine.
        if self.worker is not None:
            return self.worker
        with self.lock:
            self.check_open()
            if self.worker is None:
                self.worker = Worker(self.loop, self.to_result, self.num_threads)
        return self.worker

    def _decode(self, tokens: list[list[int]]) -> list[str]:
        """Texts of token ids, empty for a base model without a tokenizer."""
        return self.model.tokenizer.decode(tokens) if self.model.tokenizer is not None else [""] * len(tokens)


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
