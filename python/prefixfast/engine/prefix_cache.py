"""Which prefixes an engine knows, under which numbers, and which of them are on their way into the arena."""

from __future__ import annotations

import contextlib
import itertools
import logging
from dataclasses import dataclass

from prefixfast import _rust
from prefixfast.engine.prefix_loader import Loaded, Loader
from prefixfast.errors import PrefixFastError
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resident:
    """A prefix in an engine's arena.

    Attributes:
        name: In the store; None if it was given as an object.
        digest: See `Prefix.digest`.
        rows: Arena rows, P of its longest layer.
        nbytes: Bytes of these rows in all layers, also in those that the prefix leaves out: the arena has all layers of a row.
        pinned: Whether it is evicted only when nothing else is left to evict.
        requests: Queued and running requests that use it.
    """

    name: str | None
    digest: str
    rows: int
    nbytes: int
    pinned: bool
    requests: int


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
        self.grown, self.next_trim = False, KEPT_PREFIXES + 1
        self.kept: set[int] = set()
        self.doomed: set[int] = set()  # evicted as soon as nobody reads them

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
            self.grown = True
            count, own = len(self.loader.layers), prefix.layers
            layers = None if len(own) == count else [i in own for i in range(count)]
            self.scheduler.register_prefix(
                number, prefix.length, prefix.pos_start, prefix.window == "slide", layers=layers
            )
            if isinstance(prefix, StoredPrefix):
                self.loader.prefetch(number, prefix)
        self.prefixes[number] = self.prefixes.pop(number, prefix)
        return number

    def keep(self, prefix: Prefix | StoredPrefix, kept: bool) -> tuple[int, int]:
        """Evict a prefix last and load it now if there is room, or treat it as any other again; counts of loads and evictions."""
        if not kept and prefix.digest not in self.numbers:
            return 0, 0
        number = self.number(prefix)
        self.scheduler.keep_prefix(number, kept)
        (self.kept.add if kept else self.kept.discard)(number)
        if not kept:
            return 0, 0
        self.doomed.discard(number)
        found = self.scheduler.load_prefix(number)
        if found is None:
            return 0, 0
        self.begin([(number, found[0])])
        return 1, len(found[1])

    def evict(self, digest: str) -> bool:
        """Forget a prefix and clear its rows, once nobody reads them; whether that is done."""
        number = self.numbers.get(digest)
        if number is None:
            return True
        self.scheduler.keep_prefix(number, False)
        self.kept.discard(number)
        self.doomed.add(number)
        self.sweep()
        return number not in self.prefixes

    def users(self, digest: str) -> int:
        """Queued and running requests that use a prefix."""
        number = self.numbers.get(digest)
        return 0 if number is None else self.scheduler.prefix_state(number)[1]

    def sweep(self) -> None:
        """Clear what is to go and nobody reads any more."""
        for number in list(self.doomed):
            start, users = self.scheduler.prefix_state(number)
            row = None if users else self.scheduler.evict_prefix(number)
            if row is not None:
                for t in (t for kv in self.loader.layers for t in kv):
                    t[row : row + self.prefixes[number].length].zero_()
            elif users or start is not None:
                continue
            self.doomed.discard(number)
            self.drop(number)

    def resident(self, bytes_of_row: int) -> list[Resident]:
        """What lies in the arena, the least recently registered first."""
        found = []
        for number, prefix in sorted(self.prefixes.items()):
            start, users = self.scheduler.prefix_state(number)
            if start is not None:
                name = prefix.name if isinstance(prefix, StoredPrefix) else None
                found.append(
                    Resident(
                        name, prefix.digest, prefix.length, prefix.length * bytes_of_row, number in self.kept, users
                    )
                )
        return found

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
                if load.number in self.kept:
                    logger.warning("a pinned prefix could not be loaded and is pinned no more: %s", load.error)
                    self.scheduler.keep_prefix(load.number, False)
                    self.kept.discard(load.number)
            self.scheduler.prefix_ready(load.number)
        return [load for load in loads if load.error is not None]

    def drop(self, number: int) -> None:
        """Forget a prefix whose rows hold nothing of use; with requests it stays."""
        with contextlib.suppress(PrefixFastError):
            self.scheduler.forget_prefix(number)
            self.numbers.pop(self.prefixes.pop(number).digest)
            self.broken.pop(number, None)
            self.kept.discard(number)
            self.doomed.discard(number)
            self.loader.forget(number)

    def trim(self, *, busy: bool) -> None:
        """Let go of the prefixes that were not used for longest, if new ones have come; while the engine is busy only now and then."""
        if not self.grown or (busy and len(self.prefixes) < self.next_trim):
            return
        self.grown = busy  # what is in use now can go later
        for kind, most in ((Prefix, KEPT_PREFIXES), (StoredPrefix, KEPT_STORED)):
            known = [
                number
                for number, prefix in self.prefixes.items()
                if isinstance(prefix, kind) and number not in self.kept
            ]
            for number in known[: max(0, len(known) - most)]:
                self.drop(number)
        self.next_trim = len(self.prefixes) + max(1, KEPT_PREFIXES // 4)
