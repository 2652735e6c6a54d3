"""`Stream`: one request's text as it grows, for plain and for asynchronous callers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from prefixfast import _rust
from prefixfast.engine.request import Generation
from prefixfast.engine.ticket import Ticket


class Deltas:
    """Pieces of text from tokens; joined they are the text that the request's `Generation` has.

    Args:
        stream: Makes text of tokens.
        strip: The text loses leading and trailing space: then space is held back until something follows.
    """

    def __init__(self, stream: _rust.DetokenizeStream, *, strip: bool) -> None:
        self.stream, self.strip, self.held, self.begun = stream, strip, "", False

    def push(self, token: int) -> str:
        """The text that is certain with one more token, often empty."""
        return self._ready(self.stream.push([token]))

    def finish(self) -> str:
        """The rest."""
        return self._ready(self.stream.finish())

    def _ready(self, text: str) -> str:
        if not self.strip:
            return text
        text = self.held + text
        text = text if self.begun else text.lstrip()
        kept = text.rstrip()
        self.held, self.begun = text[len(kept) :], self.begun or bool(kept)
        return kept


class Stream:
    """Iterate over it for pieces of text (or ``async for``); leaving early cancels the request. Made by `Engine.stream`.

    Args:
        submit: Submits the request with the function that gets its tokens.
        deltas: Makes text of them.

    Attributes:
        generation: The result, once the iteration has ended.

    Example:
        >>> with Engine(base, max_num_seqs=8) as engine:
        ...     stream = engine.stream("Once upon", prefix, max_new_tokens=8)
        ...     "".join(piece for piece in stream) == stream.generation.text
        True
    """

    def __init__(self, submit: Callable[[Callable[[int], None]], Ticket], deltas: Deltas) -> None:
        self._deltas, self._buffer, self._change = deltas, deque[int | None](), threading.Condition()
        self._wake: Callable[[], object] | None = None  # of a coroutine that waits
        self._ticket = submit(self._put)
        self._ticket.future.add_done_callback(lambda _: self._put(None))

    @property
    def generation(self) -> Generation:
        """The result; waits for it."""
        return self._ticket.result()

    def cancel(self) -> None:
        """End the request with what it has."""
        self._ticket.cancel()

    def _put(self, token: int | None) -> None:
        with self._change:
            self._buffer.append(token)
            self._change.notify_all()
            wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the event loop is gone, and with it whoever waited
                wake()

    def _rest(self) -> str:
        _ = self.generation  # raises what went wrong
        return self._deltas.finish()

    def __iter__(self) -> Iterator[str]:
        try:
            while True:
                with self._change:
                    while not self._buffer:
                        self._change.wait()
                    token = (
                        self._buffer[0] if self._buffer[0] is None else self._buffer.popleft()
                    )  # the end stays for whoever comes again
                if token is None:
                    break
                if piece := self._deltas.push(token):
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
                with self._change:
                    tokens = list(self._buffer)
                    self._buffer.clear()
                    if tokens and tokens[-1] is None:
                        self._buffer.append(None)
                for token in tokens:
                    if piece := "" if token is None else self._deltas.push(token):
                        yield piece
                if tokens and tokens[-1] is None:
                    break
                await ready.wait()
            if piece := self._rest():
                yield piece
        finally:
            self._ticket.cancel()
