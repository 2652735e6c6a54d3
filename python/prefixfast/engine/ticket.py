"""`Ticket`, the handle of a submitted request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from typing import Protocol

from prefixfast.config.options import plain_number
from prefixfast.engine.request import Generation
from prefixfast.errors import ConfigError, RequestError, shown

MAX_TIMEOUT = 1e9  # seconds, about 30 years
logger = logging.getLogger(__name__)


class RequestOwner(Protocol):
    """Owner of the requests, as a ticket sees it."""

    def cancel(self, ticket: Ticket) -> None:
        """End the request of a ticket at the next step."""

    def check_can_wait(self) -> None:
        """Raise `ConfigError` where waiting for a request would never end."""

    def is_current_thread(self) -> bool:
        """Whether the caller runs in the engine's thread."""


class GenerationFuture(Future[Generation]):
    """Future of a `Generation`, which refuses to wait where the wait would never end.

    Args:
        owner: Engine's thread.
    """

    def __init__(self, owner: RequestOwner) -> None:
        super().__init__()
        self._owner, self._ended = owner, False

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the `Generation`.

        Args:
            timeout: Largest number of seconds to wait, None without a limit.
        """
        self.check_can_wait()
        return super().result(seconds(timeout, least=-MAX_TIMEOUT))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the error of the request, None without one.

        Args:
            timeout: Largest number of seconds to wait, None without a limit.
        """
        self.check_can_wait()
        return super().exception(seconds(timeout, least=-MAX_TIMEOUT))

    def add_done_callback(self, fn: Callable[[Future[Generation]], object]) -> None:
        """Call a function with this future once the request has ended.

        Args:
            fn: Function. Its errors are logged and concern nothing else. It runs in the engine's thread, or at once if
                the request has ended.
        """

        def guarded(future: Future[Generation]) -> None:
            try:
                fn(future)
            except BaseException as e:  # also SystemExit, which would leave out the callbacks that follow
                if isinstance(e, Exception) or not self._owner.is_current_thread():
                    raise
                logger.exception("a callback of a ticket failed")

        super().add_done_callback(guarded)

    def check_can_wait(self) -> None:
        """Raise `ConfigError` if waiting for the request would never end."""
        if not self._ended:
            self._owner.check_can_wait()

    def end(self, result: Generation | BaseException) -> None:
        """Set the result, or the error, of the request. A future that has ended is not changed.

        Args:
            result: Result or error.
        """
        try:
            if isinstance(result, BaseException):
                self.set_exception(result)
            else:
                self.set_result(result)
        except InvalidStateError:
            logger.warning("the future of a ticket was set by other code than its engine")
        self._ended = True


class Ticket:
    """Handle of a submitted request. ``await ticket`` gives its `Generation`.

    Args:
        number: Number of the request in its engine.
        owner: Engine's thread.

    Attributes:
        future: Future of the `Generation`. Its callbacks run in the engine's thread. They may submit, and must not wait
            for a request.
    """

    def __init__(self, number: int, owner: RequestOwner) -> None:
        self.number, self._owner = number, owner
        self.future = GenerationFuture(owner)
        # A cancelled coroutine that waits for the future must not cancel it. Only `cancel` ends the request.
        self.future.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the `Generation`.

        Args:
            timeout: Largest number of seconds to wait, None without a limit.

        Raises:
            TimeoutError: If the request has not ended in time. It goes on.
            PrefixFastError: If the request failed.
            ConfigError: If ``timeout`` is no number of seconds. In a callback or logits processor of the engine, or in
                a forked process, where the request could not end.
        """
        return self.future.result(timeout)

    def done(self) -> bool:
        """Whether the request has ended."""
        return self.future.done()

    def cancel(self) -> None:
        """End the request at the next step. Its result has the tokens so far and ``finish_reason="cancelled"``."""
        self._owner.cancel(self)

    def __await__(self) -> Generator[asyncio.Future[Generation], None, Generation]:
        self.future.check_can_wait()
        return asyncio.wrap_future(self.future).__await__()


def seconds(timeout: object, *, least: float) -> float | None:
    """Seconds of an argument ``timeout``, None without a limit.

    Args:
        timeout: Value of the argument.
        least: Smallest number of seconds. Where it is below 0, a time that is over already counts as 0.

    Raises:
        ConfigError: If the value is no such number.
    """
    value = plain_number(timeout)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= MAX_TIMEOUT:
        return max(value, 0)
    msg = f"timeout: expected seconds from {max(least, 0):g} to {MAX_TIMEOUT:g}, or None, got {shown(timeout)}"
    raise ConfigError(msg)


def request_error(error: BaseException) -> Exception:
    """Error of a request as an exception that harms neither its caller nor other requests.

    An exception such as SystemExit would end the caller's thread or event loop, and a future cannot hold StopIteration.

    Args:
        error: Error in the work for the request.

    Returns:
        The same error, or a `RequestError` whose cause it is.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    msg = f"the request ended with {type(error).__name__}({error}); raise an Exception to report an error"
    wrapped = RequestError(msg)
    wrapped.__cause__ = error
    return wrapped
