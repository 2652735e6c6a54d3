"""`Worker`, the thread that owns an engine's loop once requests are submitted.

Requests enter through a locked queue, and results leave as futures. Callers and event loops never run the model.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import torch

from prefixfast.engine.loop import Loop
from prefixfast.engine.output import RequestOutput
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.ticket import Ticket
from prefixfast.errors import CapacityError, ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Worker:
    """Thread that runs the steps of a loop while there are requests.

    Args:
        loop: Loop, which only this thread uses from now on.
        to_result: Function that makes the result, or the error, of a request that has ended.
        num_threads: Number of torch's CPU threads in this thread, None for torch's setting.
    """

    def __init__(
        self,
        loop: Loop,
        to_result: Callable[[RequestOutput], Generation | BaseException],
        num_threads: int | None,
    ) -> None:
        self.loop, self.to_result, self.num_threads = loop, to_result, num_threads or torch.get_num_threads()
        self.condition = threading.Condition()
        self.inbox: deque[tuple[Ticket, Request | None]] = deque()  # None cancels the ticket's request
        self.jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.tickets: dict[int, Ticket] = {}
        self.in_inbox = 0  # requests in the inbox
        self.in_queue = 0  # waiting requests of the scheduler, which only this thread may ask
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="prefixfast-engine", daemon=True)
        self.thread.start()

    def submit(self, number: int, request: Request, *, wait: bool = False) -> Ticket:
        """Queue a request.

        Args:
            number: Number that no unfinished request has.
            request: Request.
            wait: Whether to wait while ``max_waiting`` requests are waiting (back-pressure).

        Raises:
            CapacityError: If ``max_waiting`` requests are waiting.
            ConfigError: If the engine is closed.
        """
        ticket = Ticket(number, self.cancel)
        with self.condition:
            while wait and self.in_queue + self.in_inbox >= self.loop.max_waiting and not self.closing:
                self.condition.wait()
            self._check_open()
            if self.in_queue + self.in_inbox >= self.loop.max_waiting:
                msg = f"{self.loop.max_waiting} requests are waiting already; try again later or raise max_waiting"
                raise CapacityError(msg)
            self.inbox.append((ticket, request))
            self.in_inbox += 1
            self.condition.notify_all()
        return ticket

    def between_steps(self, job: Callable[[], T]) -> T:
        """Run a function in this thread between two steps, and wait for it.

        Args:
            job: Function that uses the model or the loop.

        Raises:
            ConfigError: If the engine is closed.
        """
        if threading.current_thread() is self.thread:  # called by a callback of a ticket
            return job()
        future: Future[T] = Future()
        with self.condition:
            self._check_open()
            self.jobs.append((job, future))
            self.condition.notify_all()
        return future.result()

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step with the tokens so far.

        Args:
            ticket: Ticket of the request.
        """
        with self.condition:
            self.inbox.append((ticket, None))
            self.condition.notify_all()

    def close(self) -> None:
        """End the thread, and cancel the requests that have not ended."""
        with self.condition:
            self.closing = True
            self.condition.notify_all()
        self.thread.join()

    def _check_open(self) -> None:
        if self.closing:
            msg = "this engine is closed; make a new one"
            raise ConfigError(msg)

    def _run(self) -> None:
        torch.set_num_threads(self.num_threads)  # a new thread starts with torch's default
        with torch.inference_mode():
            while self._take():
                try:
                    ended = self.loop.step() if self.loop.busy else {}
                    self.in_queue = self.loop.scheduler.num_waiting
                    for number, output in ended.items():
                        self._deliver(number, output)
                except BaseException as e:
                    logger.exception("a step failed, so all requests of this engine fail")
                    self._fail_all(e)
            self._fail_all(CancelledError())

    def _take(self) -> bool:
        """Wait for work, and take requests, cancellations and jobs.

        Returns:
            Whether the thread goes on.
        """
        with self.condition:
            self.condition.notify_all()  # the last step may have made room for a caller that waits in `submit`
            while not (self.inbox or self.jobs or self.loop.busy or self.closing):
                self.condition.wait()
            jobs, self.jobs = self.jobs, deque()
            taken, self.inbox, self.in_inbox = self.inbox, deque(), 0
            for ticket, request in taken:
                if request is None:
                    self.loop.cancel(ticket.number)
                else:
                    self._add(ticket, request)
            self.in_queue = self.loop.scheduler.num_waiting
            self.condition.notify_all()
            goes_on = not self.closing
        for job, future in jobs:
            try:
                future.set_result(job())
            except BaseException as e:
                future.set_exception(e)
        return goes_on

    def _add(self, ticket: Ticket, request: Request) -> None:
        self.tickets[ticket.number] = ticket
        try:
            self.loop.add(ticket.number, request)
        except BaseException as e:
            self.tickets.pop(ticket.number).future.set_exception(e)

    def _deliver(self, number: int, output: RequestOutput) -> None:
        ticket = self.tickets.pop(number)
        try:
            result = self.to_result(output)
        except BaseException as e:
            result = e
        if isinstance(result, BaseException):
            ticket.future.set_exception(result)
        else:
            ticket.future.set_result(result)

    def _fail_all(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):
            self.loop.reset()
        for ticket in self.tickets.values():
            ticket.future.set_exception(error)
        self.tickets.clear()
