"""`Stream`, the text of one request piece by piece, for plain and for asynchronous callers."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from prefixfast.engine.request import Generation
from prefixfast.engine.ticket import Ticket
from prefixfast.errors import ConfigError
from prefixfast.model.python_tokenizer import TextStream


class TextPieces:
    """Pieces of text from tokens. Joined, they are the text of the request's `Generation`.

    Args:
        stream: Stream that turns tokens into text.
        strip: Whether leading and trailing white space is removed. White space is then held back until text follows.
    """

    def __init__(self, stream: TextStream, *, strip: bool) -> None:
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

    A loop that is left early cancels the request. One thread or task at a time reads the stream.

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
        self._pieces = pieces
        # Unlike those of a condition, its operations are atomic, so that an interrupt leaves no lock taken.
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._reader: object = None  # thread or task that reads the stream
        self._reader_lock = threading.Lock()
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
        self._tokens.put(token)
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed, so no coroutine waits any more
                wake()

    def _rest(self) -> str:
        _ = self.generation  # raises the error of a failed request
        return self._pieces.finish()

    def _start_reading(self, reader: object) -> None:
        with self._reader_lock:
            if self._reader not in (None, reader):
                msg = "this stream is being read by another thread or task; read it in one, or make a stream for each"
                raise ConfigError(msg)
            self._reader = reader

    def _stop_reading(self, reader: object) -> None:
        if not self._ticket.future.done():  # a stream that is freed at the end of the program has no engine to ask
            self._ticket.cancel()
        if self._reader is reader:
            self._reader = None

    def __iter__(self) -> Iterator[str]:
        reader = threading.current_thread()
        self._start_reading(reader)
        try:
            while True:
                self._ticket.future.check_can_wait()
                if (token := self._tokens.get()) is None:
                    break
                if piece := self._pieces.push(token):
                    yield piece
            self._tokens.put(None)  # a second iteration ends too
            if piece := self._rest():
                yield piece
        finally:
            self._stop_reading(reader)

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, ready, reader = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
        self._start_reading(reader)
        self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        try:
            while True:
                self._ticket.future.check_can_wait()
                ready.clear()
                try:
                    token = self._tokens.get_nowait()
                except queue.Empty:
                    await ready.wait()
                    continue
                if token is None:
                    break
                if piece := self._pieces.push(token):
                    yield piece
            self._tokens.put(None)
            if piece := self._rest():
                yield piece
        finally:
            self._stop_reading(reader)
