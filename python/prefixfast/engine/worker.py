"""`Worker`, the thread that owns an engine's loop once requests are submitted.

Requests enter through a locked queue, and results leave as futures. Callers and event loops never run the model.
"""

from __future__ import annotations

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
from prefixfast.engine.ticket import Ticket, request_error
from prefixfast.errors import CapacityError, ConfigError
from prefixfast.model.process import check_same_process, end_at_exit, process_id

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Worker:
    """Thread that runs the steps of a loop while there are requests.

    Trained weights cannot act in the base model as long as there is the thread, whose requests need not end.

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
        # An interrupt in a with statement of a lock releases it, in one of a condition it can leave it taken.
        self.lock = threading.RLock()
        self.condition = threading.Condition(self.lock)
        self.inbox: deque[tuple[Ticket, Request | None]] = deque()  # None cancels the ticket's request
        self.jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.tickets: dict[int, Ticket] = {}  # requests of the loop, by number
        self.in_inbox = 0  # requests that are not in the loop yet
        self.in_queue = 0  # waiting requests of the scheduler, which only this thread may ask
        self.closing = self.stepping = False
        self.process_id = process_id()
        loop.model.guard.add_engine()
        self.thread = threading.Thread(target=self._run, name="prefixfast-engine", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # this process can start no more threads
            loop.model.guard.remove_engine()
            raise
        end_at_exit(self)

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
        ticket = Ticket(number, self)
        with self.lock:
            while wait and self.in_queue + self.in_inbox >= self.loop.max_waiting and not self.closing:
                self.condition.wait()
            self._check_open()
            if self.in_queue + self.in_inbox >= self.loop.max_waiting:
                msg = f"{self.loop.max_waiting} requests are waiting already; try again later or raise max_waiting"
                raise CapacityError(msg)
            self.in_inbox += 1
            self.inbox.append((ticket, request))
            self.condition.notify_all()
        return ticket

    def between_steps(self, job: Callable[[], T]) -> T:
        """Run a function in this thread between two steps, and wait for it.

        Args:
            job: Function that uses the model or the loop.

        Raises:
            ConfigError: If the engine is closed.
        """
        if self.is_current_thread():  # called by a callback of a ticket
            return job()
        future: Future[T] = Future()
        with self.lock:
            self._check_open()
            self.jobs.append((job, future))
            self.condition.notify_all()
        return future.result()

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step with the tokens so far.

        Args:
            ticket: Ticket of the request.

        Raises:
            ConfigError: In a forked process.
        """
        check_same_process(self.process_id, "engine")
        with self.lock:
            self.inbox.append((ticket, None))
            self.condition.notify_all()

    def is_current_thread(self) -> bool:
        """Whether the caller runs in this thread."""
        return threading.current_thread() is self.thread

    def check_can_wait(self) -> None:
        """Raise `ConfigError` where waiting for a request would never end.

        Raises:
            ConfigError: In this thread, in a forked process, or in a run with trained weights.
        """
        check_same_process(self.process_id, "engine")
        self.loop.model.guard.check_not_changing()
        if self.is_current_thread():
            msg = (
                "a logits processor and a callback of a ticket run in the engine's own thread and cannot wait for a "
                "request of this engine; wait in another thread, or use add_done_callback"
            )
            raise ConfigError(msg)

    def end(self, timeout: float | None = None) -> None:
        """End the thread, and cancel the requests that have not ended.

        Args:
            timeout: Largest number of seconds to wait, None without a limit.
        """
        with self.lock:
            self.closing = True
            self.condition.notify_all()
        self.thread.join(timeout)

    def _check_open(self) -> None:
        if self.closing:
            msg = "this engine is closed; make a new one"
            raise ConfigError(msg)

    def _run(self) -> None:
        error: BaseException = CancelledError()
        try:
            torch.set_num_threads(self.num_threads)  # a new thread starts with torch's default
            with torch.inference_mode():
                while self._take():
                    if self.tickets:
                        self._step()
        except BaseException as e:
            logger.exception("the engine's thread failed")
            error = e
        self.loop.end_run()
        self.loop.model.guard.remove_engine()
        with self.lock:
            self.closing = True
            jobs, left = list(self.jobs), [ticket for ticket, request in self.inbox if request is not None]
            self.condition.notify_all()
        for _, future in jobs:
            future.set_exception(error)
        self._end_all([*self.tickets.values(), *left], error)

    def _step(self) -> None:
        """Run one step of the loop, and deliver what has ended."""
        self.stepping = True
        try:
            ended = self.loop.step()
            error = None
        except BaseException as e:
            logger.exception("a step failed, so all requests of this engine fail")
            ended, error = {}, e
        self.stepping = False
        if error is not None:
            self._fail_all(error)
        for number, output in ended.items():
            try:
                result = self.to_result(output)
            except BaseException as e:
                result = e
            self._end(self.tickets.pop(number), result)

    def _take(self) -> bool:
        """Wait for work, and take requests, cancellations and jobs.

        Returns:
            Whether the thread goes on.
        """
        with self.lock:
            self.in_queue = self.loop.scheduler.num_waiting
            self.condition.notify_all()  # the last step may have made room for a caller that waits in `submit`
            while not (self.inbox or self.jobs or self.tickets or self.closing):
                self.condition.wait()
            jobs, self.jobs = self.jobs, deque()
            taken, self.inbox = self.inbox, deque()
            goes_on = not self.closing
        # Without the lock, since the callbacks of a request that cannot run are code of the caller.
        for ticket, request in taken:
            if request is None:
                self.loop.cancel(ticket.number)
            else:
                self._add(ticket, request)
        if taken:
            with self.lock:
                self.in_inbox -= sum(request is not None for _, request in taken)
                self.in_queue = self.loop.scheduler.num_waiting
                self.condition.notify_all()
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
            del self.tickets[ticket.number]
            self._end(ticket, e)

    def _end(self, ticket: Ticket, result: Generation | BaseException) -> None:
        ticket.future.end(request_error(result) if isinstance(result, BaseException) else result)

    def _end_all(self, tickets: list[Ticket], error: BaseException) -> None:
        self.tickets.clear()
        for ticket in tickets:
            self._end(ticket, error)

    def _fail_all(self, error: BaseException) -> None:
        """Fail all requests of the loop after an error in the middle of a step."""
        try:
            self.loop.restart()
        except BaseException as e:  # the loop cannot run again, so the thread ends
            logger.exception("the engine's loop could not be restarted")
            self.closing, error = True, e
        self._end_all(list(self.tickets.values()), error)
