"""Contenders and measured points of the suite ``generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from prefixfast.bench.contenders import RunSettings
from prefixfast.bench.harness import Timing

OURS = "prefixfast"
ONE_BY_ONE = "PEFT, one request at a time"
ONE_FOR_ALL = "PEFT, one prefix for all"
BY_HAND = "transformers, mixed batch by hand"


class Key(NamedTuple):
    """Contender, number of distinct prefixes and number of requests of one timed call."""

    contender: str
    distinct: int
    requests: int


@dataclass(frozen=True)
class Point:
    """Time of one contender at one prefix length.

    Attributes:
        key: Contender with its prefixes and requests.
        prefix_length: Rows of each prefix.
        batch: Requests of the workload.
        tokens: Tokens that one round generates.
        timing: Seconds of each round.
        settings: Settings under which the contender ran.
    """

    key: Key
    prefix_length: int
    batch: int
    tokens: int
    timing: Timing
    settings: RunSettings

    @property
    def rate(self) -> float:
        """Tokens a second in the fastest round."""
        return self.tokens / self.timing.best

    @property
    def token_milliseconds(self) -> float:
        """Milliseconds between two tokens of one request, in the fastest round."""
        together = 1 if self.key.contender == ONE_BY_ONE else self.key.requests
        return 1e3 * together / self.rate

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return self.key.contender if self.key.contender != OURS else f"{OURS}, {self.key.distinct} distinct"

    def row(self) -> dict[str, Any]:
        """Record of the results file."""
        return {
            "contender": self.key.contender,
            "prefix_length": self.prefix_length,
            "distinct": self.key.distinct,
            "requests": self.batch,
            "tokens": self.tokens,
            "seconds": [round(s, 4) for s in self.timing.seconds],
            "tokens_per_second": round(self.rate, 2),
            "settings": self.settings.row(),
        }
