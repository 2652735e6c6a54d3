"""`Stream`, the text of one request piece by piece, for plain and for asynchronous callers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from prefixfast import _rust
from prefixfast.engine.request import Generation
from prefixfast.engine.ticket import Ticket


class TextPieces:
    """Pieces of text from tokens. Joined, they are the text of the request's `Generation`.

    Args:
        stream: Stream that turns tokens into text.
        strip: Whether leading and trailing white space is removed. White space is then held back until text follows.
    """

    def __init__(self, stream: _rust.DetokenizeStream, *, strip: bool) -> None:
        self.stream, self.strip, self.held_space, self.has_text = stream, strip, "", False

    def push(self, token: int) -> str:
        """Text that is complete with one more token, often empty.

        Args:
            token: Next token.
        """
        return self._stripped(self.stream.push([token]))

    def finish(self) -> str:
        """Rest of the text after the last token."""
        return self._stripped(self.stream.finish())

    def _stripped(self, text: str) -> str:
        if not self.strip:
            return text
        text = self.held_space + text
        text = text if self.has_text else text.lstrip()
        ready = text.rstrip()
        self.held_space, self.has_text = text[len(ready) :], self.has_text or bool(ready)
        return ready


class Stream:
    """Text of one request piece by piece, from `Engine.stream`. Use it with ``for`` or ``async for``.

    A loop that is left early cancels the request.

    Args:
        submit: Function that submits the request. Its argument is the function that gets each token.
        pieces: Conversion of tokens to pieces of text.

    Attributes:
        generation: Result of the request. Reading it waits for the end of the request.

    Example:
        >>> with Engine(base, max_num_seqs=8) as engine:
        ...     stream = engine.stream("Once upon", prefix, max_new_tokens=8)
        ...     "".join(piece for piece in stream) == stream.generation.text
        True
    """

    def __init__(self, submit: Callable[[Callable[[int], None]], Ticket], pieces: TextPieces) -> None:
        self._pieces, self._tokens, self._condition = pieces, deque[int | None](), threading.Condition()
        self._wake: Callable[[], object] | None = None  # wakes a waiting coroutine
        self._ticket = submit(self._put)
        self._ticket.future.add_done_callback(lambda _: self._put(None))

    @property
    def generation(self) -> Generation:
        """Result of the request. Reading it waits for the end of the request."""
        return self._ticket.result()

    def cancel(self) -> None:
        """End the request at the next step with the tokens so far."""
        self._ticket.cancel()

    def _put(self, token: int | None) -> None:
        """Add a token, or None at the end."""
        with self._condition:
            self._tokens.append(token)
            self._condition.notify_all()
            wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed, so no coroutine waits any more
                wake()

    def _rest(self) -> str:
        _ = self.generation  # raises the error of a failed request
        return self._pieces.finish()

    def __iter__(self) -> Iterator[str]:
        try:
            while True:
                with self._condition:
                    while not self._tokens:
                        self._condition.wait()
                    # The end mark stays in the queue, so that a second iteration ends too.
                    token = self._tokens[0] if self._tokens[0] is None else self._tokens.popleft()
                if token is None:
                    break
                if piece := self._pieces.push(token):
                    yield piece
            if piece := self._rest():
                yield piece
        finally:
            self._ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        try:
            while True:
                ready.clear()
                with self._condition:
                    tokens = list(self._tokens)
                    self._tokens.clear()
                    if tokens and tokens[-1] is None:
                        self._tokens.append(None)
                for token in tokens:
                    if piece := "" if token is None else self._pieces.push(token):
                        yield piece
                if tokens and tokens[-1] is None:
                    break
                await ready.wait()
            if piece := self._rest():
                yield piece
        finally:
            self._ticket.cancel()
