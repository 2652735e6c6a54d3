"""`loss_advice`: what to try if training did not lower the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST_FALL = 0.01  # relative; a tiny learning rate also lowers the loss, in the sixth digit


def loss_advice(metrics: Mapping[str, float | None], config: Mapping[str, Any]) -> str | None:
    """Sentence that says that training did not lower the loss and what to try, None if it did.

    The loss on held-out rows counts if there is one, else the training loss of the last step against the first.

    Args:
        metrics: Metrics of the prefix.
        config: Values of its `TrainConfig`.
    """
    if metrics.get("steps") == 0:  # a method without training
        return None
    first, last = (metrics.get(n) for n in ("first_loss", "loss"))
    kind, overfits, evaluated = "the training loss", False, "eval_loss" in metrics
    if evaluated:
        overfits = _has_fallen(first, last)
        first, last = (metrics.get(n) for n in ("eval_loss_before", "eval_loss"))
        kind = "the loss on held-out rows"
    if _has_fallen(first, last) or (not evaluated and metrics.get("steps") == 1):  # one step has one training loss
        return None
    rose = first is not None and last is not None and last > first
    what = f"{kind} {'rose' if rose else f'did not fall by {LEAST_FALL:.0%}'}"
    rate, steps = config.get("learning_rate"), metrics.get("steps")
    now = f"learning_rate (now {rate:g})" if isinstance(rate, float) else "learning_rate"
    if rose and overfits:
        return f"{what}, the training loss fell: try a lower {now}, fewer steps (max_steps, now {steps:g}) or more rows"
    return f"{what}: try another {now} or more steps (max_steps, now {steps:g})"


def _has_fallen(first: float | None, last: float | None) -> bool:
    return first is not None and last is not None and last < (1 - LEAST_FALL) * first
