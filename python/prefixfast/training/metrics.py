"""Metrics of each prefix at the end of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.training.best_state import BestState
    from prefixfast.training.progress import GroupProgress


def prefix_metrics(
    progress: GroupProgress, best: BestState, i: int, counts: Mapping[str, float], *, evaluated: bool
) -> dict[str, float]:
    """Metrics of one prefix.

    Args:
        progress: Progress of the prefixes of the group.
        best: Best states of the prefixes of the group.
        i: Number of the prefix in its group.
        counts: Numbers of rows, held-out rows, examples, skipped rows and truncated rows.
        evaluated: Whether there are held-out rows.

    Returns:
        ``first_loss``, ``loss``, ``steps``, ``skipped_steps`` and ``counts``; with held-out rows also
        ``eval_loss_before``, ``eval_loss`` and ``best_step``.
    """
    steps, skipped = float(progress.num_done[i]), float(progress.num_skipped[i])
    found = {"first_loss": float(progress.first_loss[i]), "loss": float(progress.loss[i])}
    found |= {"steps": steps, "skipped_steps": skipped}
    if evaluated:
        has_best = best.has(i)
        found["eval_loss_before"] = float(progress.eval_loss_before[i])
        found["eval_loss"] = float(best.loss[i] if has_best else progress.eval_loss[i])
        found["best_step"] = float(best.step[i] if has_best else progress.num_done[i])
    return found | {name: float(count) for name, count in counts.items()}


def stored_metrics(prefix: Prefix) -> dict[str, float]:
    """Metrics that a saved prefix carries; a number that is not finite, which JSON cannot hold, is NaN."""
    found: Any = prefix.training.get("metrics") or {}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}
