"""`Ticket`, the handle of a submitted request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future

from prefixfast.engine.request import Generation


class Ticket:
    """Handle of a submitted request. ``await ticket`` gives its `Generation`.

    Args:
        number: Number of the request in its engine.
        cancel: Function that cancels the request of this ticket.

    Attributes:
        future: Future of the `Generation`. Its callbacks run in the engine's thread.
    """

    def __init__(self, number: int, cancel: Callable[[Ticket], None]) -> None:
        self.number, self._cancel = number, cancel
        self.future: Future[Generation] = Future()
        # A cancelled coroutine that waits for the future must not cancel it. Only `cancel` ends the request.
        self.future.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the `Generation`.

        Args:
            timeout: Largest number of seconds to wait, None without a limit.

        Raises:
            TimeoutError: If the request has not ended in time. It goes on.
            PrefixFastError: If the request failed.
        """
        return self.future.result(timeout)

    def done(self) -> bool:
        """Whether the request has ended."""
        return self.future.done()

    def cancel(self) -> None:
        """End the request at the next step. Its result has the tokens so far and ``finish_reason="cancelled"``."""
        self._cancel(self)

    def __await__(self) -> Generator[asyncio.Future[Generation], None, Generation]:
        return asyncio.wrap_future(self.future).__await__()
