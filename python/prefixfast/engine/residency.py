"""Which prefixes an engine knows, under which numbers, and which of them are on their way into the arena."""

from __future__ import annotations

import contextlib
import itertools

from prefixfast import _rust
from prefixfast.engine.loader import Loaded, Loader
from prefixfast.errors import PrefixFastError
from prefixfast.prefix import Prefix
from prefixfast.store import StoredPrefix

KEPT_PREFIXES = 256  # given as objects, beyond those that requests are using
KEPT_STORED = 1 << 16  # known by their entry only


class Residency:
    """Numbers of prefixes by content, and their way into the arena.

    Args:
        scheduler: Decides what is resident.
        loader: Copies.
    """

    def __init__(self, scheduler: _rust.Scheduler, loader: Loader) -> None:
        self.scheduler, self.loader = scheduler, loader
        self.numbers: dict[str, int] = {}  # digest -> number
        self.prefixes: dict[int, Prefix | StoredPrefix] = {}  # the one used last comes last
        self.ids = itertools.count()
        self.pending: list[tuple[int, int]] = []  # loads that the scheduler asked for and that have not begun
        self.broken: dict[int, BaseException] = {}  # could not be read: their rows hold nothing

    def number(self, prefix: Prefix | StoredPrefix) -> int:
        """The scheduler's number of a prefix; equal content has one number.

        Raises:
            BaseException: What went wrong when it was read, while requests that met it are being dropped.
        """
        number = self.numbers.get(prefix.digest)
        if number in self.broken:
            error = self.broken[number]
            self.drop(number)
            if number in self.broken:
                raise error
            number = None
        if number is None:
            number = self.numbers[prefix.digest] = next(self.ids)
            self.scheduler.register_prefix(number, prefix.length, prefix.pos_start, prefix.window == "slide")
            if isinstance(prefix, StoredPrefix):
                self.loader.prefetch(number, prefix)
        self.prefixes[number] = self.prefixes.pop(number, prefix)
        return number

    def begin(self, loads: list[tuple[int, int]]) -> None:
        """Begin what a step's header asks for; what an interrupt leaves is begun at the next call."""
        self.pending += loads
        while self.pending:
            number, row = self.pending[-1]
            self.loader.load(number, self.prefixes[number], row)
            self.pending.pop()

    def arrived(self, *, wait: bool) -> list[Loaded]:
        """Tell the scheduler what has arrived; returns the loads that failed (their requests must be cancelled)."""
        loads = self.loader.finished(wait=wait)
        for load in loads:
            if load.error is not None:
                self.broken[load.number] = load.error
            self.scheduler.prefix_ready(load.number)
        return [load for load in loads if load.error is not None]

    def drop(self, number: int) -> None:
        """Forget a prefix whose rows hold nothing of use; with requests it stays."""
        with contextlib.suppress(PrefixFastError):
            self.scheduler.forget_prefix(number)
            self.numbers.pop(self.prefixes.pop(number).digest)
            self.broken.pop(number, None)
            self.loader.forget(number)

    def trim(self) -> None:
        """Let go of the prefixes that were not used for longest."""
        for kind, most in ((Prefix, KEPT_PREFIXES), (StoredPrefix, KEPT_STORED)):
            known = [number for number, prefix in self.prefixes.items() if isinstance(prefix, kind)]
            for number in known[: max(0, len(known) - most)]:
                self.drop(number)
