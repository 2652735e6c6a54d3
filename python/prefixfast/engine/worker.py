"""A thread that owns a loop: requests go in by a locked queue, results come out as futures, so that callers and event loops never run the model."""

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
from prefixfast.engine.output import Outcome
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.ticket import Ticket
from prefixfast.errors import CapacityError, ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Worker:
    """Runs a loop's steps while there are requests.

    Args:
        loop: Belongs to this thread from now on.
        finish: Makes the result of an outcome.
        num_threads: Of torch in this thread; None leaves them.
    """

    def __init__(
        self, loop: Loop, finish: Callable[[Outcome], Generation | BaseException], num_threads: int | None
    ) -> None:
        self.loop, self.finish, self.num_threads = loop, finish, num_threads or torch.get_num_threads()
        self.change = threading.Condition()
        self.inbox: deque[tuple[Ticket, Request | None]] = deque()  # None: cancel
        self.jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.tickets: dict[int, Ticket] = {}
        self.waiting = 0  # in the inbox, not cancels
        self.queued = 0  # in the scheduler, which only the loop's thread may ask
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="prefixfast-engine", daemon=True)
        self.thread.start()

    def submit(self, number: int, request: Request, *, wait: bool = False) -> Ticket:
        """Queue a request; with ``wait`` block while too many wait.

        Raises:
            CapacityError: If too many wait.
            ConfigError: If the engine is closed.
        """
        ticket = Ticket(number, self.cancel)
        with self.change:
            while wait and self.queued + self.waiting >= self.loop.max_waiting and not self.closing:
                self.change.wait()
            if self.closing:
                msg = "this engine is closed: make a new one"
                raise ConfigError(msg)
            if self.queued + self.waiting >= self.loop.max_waiting:
                msg = f"{self.loop.max_waiting} requests are waiting already; try again later or raise max_waiting"
                raise CapacityError(msg)
            self.inbox.append((ticket, request))
            self.waiting += 1
            self.change.notify_all()
        return ticket

    def call(self, job: Callable[[], T]) -> T:
        """Run something between two steps, in the thread that owns the model, and wait for it.

        Raises:
            ConfigError: If the engine is closed.
        """
        if threading.current_thread() is self.thread:  # a callback of a ticket
            return job()
        future: Future[T] = Future()
        with self.change:
            if self.closing:
                msg = "this engine is closed: make a new one"
                raise ConfigError(msg)
            self.jobs.append((job, future))
            self.change.notify_all()
        return future.result()

    def cancel(self, ticket: Ticket) -> None:
        """See `Ticket.cancel`."""
        with self.change:
            self.inbox.append((ticket, None))
            self.change.notify_all()

    def close(self) -> None:
        """End the thread; requests that have not ended are cancelled."""
        with self.change:
            self.closing = True
            self.change.notify_all()
        self.thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self.num_threads)  # a new thread starts with torch's default
        with torch.inference_mode():
            while self._take():
                try:
                    ended = self.loop.step() if self.loop.busy else {}
                    self.queued = self.loop.scheduler.num_waiting
                    for number, outcome in ended.items():
                        self._deliver(number, outcome)
                except BaseException as e:
                    logger.exception("a step failed; all requests of this engine fail with it")
                    self._fail_all(e)
            self._fail_all(CancelledError())

    def _take(self) -> bool:
        """Wait for work and take in what came; False: it is over."""
        with self.change:
            self.change.notify_all()  # whoever waits for room: the last step may have made some
            while not (self.inbox or self.jobs or self.loop.busy or self.closing):
                self.change.wait()
            jobs, self.jobs = self.jobs, deque()
            taken, self.inbox, self.waiting = self.inbox, deque(), 0
            for ticket, request in taken:
                if request is None:
                    self.loop.cancel(ticket.number)
                else:
                    self._add(ticket, request)
            self.queued = self.loop.scheduler.num_waiting
            self.change.notify_all()
            going = not self.closing
        for job, future in jobs:
            try:
                future.set_result(job())
            except BaseException as e:
                future.set_exception(e)
        return going

    def _add(self, ticket: Ticket, request: Request) -> None:
        self.tickets[ticket.number] = ticket
        try:
            self.loop.add(ticket.number, request)
        except BaseException as e:
            self.tickets.pop(ticket.number).future.set_exception(e)

    def _deliver(self, number: int, outcome: Outcome) -> None:
        ticket = self.tickets.pop(number)
        try:
            made = self.finish(outcome)
        except BaseException as e:
            made = e
        if isinstance(made, BaseException):
            ticket.future.set_exception(made)
        else:
            ticket.future.set_result(made)

    def _fail_all(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):
            self.loop.abandon()
        for ticket in self.tickets.values():
            ticket.future.set_exception(error)
        self.tickets.clear()
