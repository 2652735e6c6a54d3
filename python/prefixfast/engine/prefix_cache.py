"""`PrefixCache`, the prefixes that an engine knows, and which of them lie in the KV arena."""

from __future__ import annotations

import contextlib
import itertools
import logging
from dataclasses import dataclass

from prefixfast import _rust
from prefixfast.attention.plan import FRONT
from prefixfast.engine.arena_sites import PrefixRun
from prefixfast.engine.prefix_loader import FinishedLoad, PrefixLoader
from prefixfast.errors import PrefixFastError
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resident:
    """A prefix in an engine's KV arena.

    Attributes:
        name: Name of the prefix in the store, None if it was passed as an object.
        digest: Digest of the prefix.
        rows: Number of rows of the KV arena, one per row P of the prefix's longest layer. An encoder-decoder base has
            rows for each site, and a few between sites.
        nbytes: Bytes of these rows in all layers, including layers that the prefix does not have.
        pinned: Whether the prefix is pinned.
        requests: Number of waiting and running requests that use the prefix.
    """

    name: str | None
    digest: str
    rows: int
    nbytes: int
    pinned: bool
    requests: int


MAX_PREFIXES = 256  # prefixes passed as objects that are known beside those of unfinished requests
MAX_STORED_PREFIXES = 1 << 16  # prefixes from stores, of which only the entry is known


class PrefixCache:
    """Numbers of the known prefixes, their loads into the KV arena, pins and evictions.

    Args:
        scheduler: Scheduler, which decides which prefixes are resident.
        loader: Loader that copies prefixes into the arena.
        infix_place: Place of prefixes before the last prompt token in plans.
    """

    def __init__(self, scheduler: _rust.Scheduler, loader: PrefixLoader, infix_place: int) -> None:
        self.scheduler, self.loader, self.infix_place = scheduler, loader, infix_place
        self.numbers: dict[str, int] = {}  # by digest
        self.prefixes: dict[int, Prefix | StoredPrefix] = {}  # by number, the most recently used one last
        self.runs: dict[int, PrefixRun] = {}  # by number
        self.next_number = itertools.count()
        self.load_errors: dict[int, BaseException] = {}  # by number: the arena rows of these prefixes are invalid
        self.has_new, self.next_trim = False, MAX_PREFIXES + 1
        self.pinned: set[int] = set()
        self.evicting = 0, 0  # first row and number of rows of the last eviction, which an interrupt can have cut short
        self.pending_eviction: set[int] = set()  # evicted as soon as no request uses them

    def number_of(self, prefix: Prefix | StoredPrefix) -> int:
        """Scheduler's number of a prefix, which is registered if it is new. Prefixes of equal content share a number.

        Args:
            prefix: Prefix, or its entry in a store.

        Raises:
            BaseException: Error of an earlier load, while the requests that it concerns have not ended.
        """
        number = self.numbers.get(prefix.digest)
        if number in self.load_errors:
            error = self.load_errors[number]
            self.forget(number)
            if number in self.load_errors:
                raise error
            number = None
        if number is None:
            number = self.numbers[prefix.digest] = next(self.next_number)
            self.has_new = True
            self._register(number, prefix)
            if isinstance(prefix, StoredPrefix):
                self.loader.prefetch(number, prefix)
        self.prefixes[number] = self.prefixes.pop(number, prefix)
        return number

    def _register(self, number: int, prefix: Prefix | StoredPrefix) -> None:
        """Tell the scheduler about a new prefix."""
        run = self.runs[number] = self.loader.places.run(prefix)
        place = self.infix_place if prefix.position == "infix" else FRONT
        slides, (own, *others) = prefix.window == "slide", run.sites.values()
        if others:
            sites = [own, *others]
            self.scheduler.register_prefix(number, run.rows, prefix.pos_start, slides, place=place, sites=sites)
        else:
            self.scheduler.register_prefix(number, run.rows, prefix.pos_start, slides, place=place, layers=own.layers)

    def set_pinned(self, prefix: Prefix | StoredPrefix, pinned: bool) -> tuple[int, int]:
        """Pin a prefix and load it if there is room, or unpin it.

        Args:
            prefix: Prefix, or its entry in a store.
            pinned: Whether the prefix is evicted only if no other prefix can be evicted.

        Returns:
            Numbers of started loads and of evictions.
        """
        if not pinned and prefix.digest not in self.numbers:
            return 0, 0
        number = self.number_of(prefix)
        self.scheduler.keep_prefix(number, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(number)
        if not pinned:
            return 0, 0
        self.pending_eviction.discard(number)
        found = self.scheduler.load_prefix(number)
        if found is None:
            return 0, 0
        row, evicted = found
        self.start_loads([(number, row)])
        return 1, len(evicted)

    def evict(self, digest: str) -> bool:
        """Forget a prefix and set its rows in the KV arena to zero, as soon as no request uses it.

        Args:
            digest: Digest of the prefix.

        Returns:
            Whether the prefix is gone already.
        """
        number = self.numbers.get(digest)
        if number is None:
            return True
        self.scheduler.keep_prefix(number, False)
        self.pinned.discard(number)
        self.pending_eviction.add(number)
        self.evict_pending()
        return number not in self.prefixes

    def num_requests(self, digest: str) -> int:
        """Number of waiting and running requests that use a prefix."""
        number = self.numbers.get(digest)
        return 0 if number is None else self.scheduler.prefix_state(number)[1]

    def evict_pending(self) -> None:
        """Evict the prefixes of ``pending_eviction`` that no request uses any more."""
        for number in list(self.pending_eviction):
            start, requests = self.scheduler.prefix_state(number)
            if start is not None and not requests:
                self.evicting = start, self.runs[number].rows
            row = None if requests else self.scheduler.evict_prefix(number)
            if row is not None:
                self.loader.places.clear(row, self.runs[number].rows)
            elif requests or start is not None:
                continue
            self.pending_eviction.discard(number)
            self.forget(number)

    def clear_rows(self) -> None:
        """Set the rows of all prefixes in the KV arena to zero. No load may run."""
        self.loader.places.clear(*self.evicting)
        for number in self.prefixes:
            with contextlib.suppress(PrefixFastError):  # forgotten by the scheduler already
                start, _ = self.scheduler.prefix_state(number)
                if start is not None:
                    self.loader.places.clear(start, self.runs[number].rows)

    def pinned_prefixes(self) -> list[Prefix | StoredPrefix]:
        """Pinned prefixes."""
        return [self.prefixes[number] for number in self.pinned if number in self.prefixes]

    def resident(self, row_bytes: int) -> list[Resident]:
        """Prefixes in the arena, or on their way there, in the order of their registration.

        Args:
            row_bytes: Bytes of an arena row in all layers.
        """
        found = []
        for number, prefix in sorted(self.prefixes.items()):
            start, requests = self.scheduler.prefix_state(number)
            if start is not None:
                name = prefix.name if isinstance(prefix, StoredPrefix) else None
                rows, pinned = self.runs[number].rows, number in self.pinned
                found.append(Resident(name, prefix.digest, rows, rows * row_bytes, pinned, requests))
        return found

    def start_loads(self, loads: list[tuple[int, int]]) -> None:
        """Start the loads of a step.

        Args:
            loads: Prefix number and first arena row of each load.
        """
        for number, row in loads:
            self.loader.load(number, self.prefixes[number], self.runs[number], row)

    def finish_loads(self, *, wait: bool) -> list[FinishedLoad]:
        """Tell the scheduler which loads have finished.

        Args:
            wait: Whether to wait for at least one load, if any is running.

        Returns:
            Failed loads. The caller cancels their requests.
        """
        loads = self.loader.finished(wait=wait)
        for load in loads:
            if load.error is not None:
                self.load_errors[load.number] = load.error
                if load.number in self.pinned:
                    logger.warning("a pinned prefix could not be loaded and is unpinned: %s", load.error)
                    self.scheduler.keep_prefix(load.number, False)
                    self.pinned.discard(load.number)
            self.scheduler.prefix_ready(load.number)
        return [load for load in loads if load.error is not None]

    def forget(self, number: int) -> None:
        """Forget a prefix, unless a request uses it or it is being loaded.

        Args:
            number: Number of the prefix.
        """
        with contextlib.suppress(PrefixFastError):
            self.scheduler.forget_prefix(number)
            self.numbers.pop(self.prefixes.pop(number).digest)
            self.runs.pop(number, None)
            self.load_errors.pop(number, None)
            self.pinned.discard(number)
            self.pending_eviction.discard(number)
            self.loader.forget(number)

    def trim(self, *, busy: bool) -> None:
        """Forget the least recently used prefixes beyond the limits, if there are new ones.

        Args:
            busy: Whether requests are waiting or running. If so, prefixes are trimmed only once in a while.
        """
        if not self.has_new or (busy and len(self.prefixes) < self.next_trim):
            return
        self.has_new = busy  # prefixes in use now can be forgotten later
        for kind, limit in ((Prefix, MAX_PREFIXES), (StoredPrefix, MAX_STORED_PREFIXES)):
            unpinned = [
                number
                for number, prefix in self.prefixes.items()
                if isinstance(prefix, kind) and number not in self.pinned
            ]
            for number in unpinned[: max(0, len(unpinned) - limit)]:
                self.forget(number)
        self.next_trim = len(self.prefixes) + max(1, MAX_PREFIXES // 4)
