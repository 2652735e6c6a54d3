"""`Ticket`: the handle of a submitted request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future

from prefixfast.engine.request import Generation


class Ticket:
    """A submitted request; awaitable.

    Args:
        number: Number of the request in its engine.
        cancel: Function that ends the request with this ticket.
    """

    def __init__(self, number: int, cancel: Callable[[Ticket], None]) -> None:
        self.number, self._cancel = number, cancel
        self.future: Future[Generation] = Future()
        self.future.set_running_or_notify_cancel()  # only `cancel` below ends a request, not a cancelled coroutine that waits for it

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the `Generation`, at most ``timeout`` seconds; None: as long as it takes.

        Raises:
            TimeoutError: If it is not there in time; the request goes on.
            PrefixFastError: If the request failed.
        """
        return self.future.result(timeout)

    def done(self) -> bool:
        """Whether the result is there."""
        return self.future.done()

    def cancel(self) -> None:
        """End the request at the next step; its result is then what it has, with ``finish_reason="cancelled"``."""
        self._cancel(self)

    def __await__(self) -> Generator[object, None, Generation]:
        return asyncio.wrap_future(self.future).__await__()
