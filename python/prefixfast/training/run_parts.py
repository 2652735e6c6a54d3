"""The result of a run of which several processes have each trained some prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError, shown
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.saved_prefixes import SavedPrefixes
from prefixfast.training.train_run import RunTotals, TrainRun

if TYPE_CHECKING:
    from prefixfast.store import PrefixStore


class RunPart(NamedTuple):
    """What a process tells of the prefixes that it has trained; the prefixes themselves are in the store.

    Attributes:
        metrics: Metrics by name.
        failed: Error message by name.
        unchanged: Names that an earlier run had finished.
        variants: Options that a sweep varies, by name.
        totals: Speed and time.
    """

    metrics: dict[str, dict[str, float]]
    failed: dict[str, str]
    unchanged: tuple[str, ...]
    variants: dict[str, dict[str, JSON | Prefix]]
    totals: RunTotals

    @classmethod
    def of(cls, run: TrainRun) -> RunPart:
        """Part of a run.

        Args:
            run: Result of one process.
        """
        return cls(run.metrics, run.failed, run.unchanged, run.variants, run.totals)


def merge_parts(
    parts: Sequence[RunPart],
    store: PrefixStore,
    *,
    order: Iterable[str] | None = None,
    log: Sequence[dict[str, JSON]] = (),
) -> TrainRun:
    """Result of all processes.

    Args:
        parts: Parts, at least one.
        store: Store that has the prefixes of all processes.
        order: Names in the order of the result, of which those without a prefix are left out. None takes that of the
            parts.
        log: Log lines of the result.

    Raises:
        DataError: If no process has trained a prefix.
    """
    metrics = {n: m for part in parts for n, m in part.metrics.items()}
    failed = {n: text for part in parts for n, text in part.failed.items()}
    names = [n for n in (metrics if order is None else order) if n in metrics]
    if not names:
        name, text = next(iter(failed.items()))
        msg = f"data: no prefix is left to train; of {shown(name)}: {text}"
        raise DataError(msg)
    unchanged, totals = {n for part in parts for n in part.unchanged}, [part.totals for part in parts]
    about = next((t for t in totals if t.base), totals[0])
    return TrainRun(
        prefixes=SavedPrefixes({n: store.info(n) for n in names}),
        metrics={n: metrics[n] for n in names},
        log=list(log),
        failed=failed,
        variants={n: v for part in parts for n, v in part.variants.items()},
        unchanged=tuple(n for n in names if n in unchanged),
        totals=RunTotals(
            base=about.base,
            dtype=about.dtype,
            device=about.device,
            examples=sum(t.examples for t in totals),
            tokens=sum(t.tokens for t in totals),
            seconds=max(t.seconds for t in totals),
        ),
    )
