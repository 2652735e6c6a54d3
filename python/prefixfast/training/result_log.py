"""Lines that a run logs at its end. The command line, which prints a summary, turns this logger off."""

from __future__ import annotations

import logging

from prefixfast.io.text import counted
from prefixfast.training.train_run import TrainRun

logger = logging.getLogger(__name__)


def log_result(run: TrainRun) -> None:
    """Log base model, time and speed of a run, and warn of losses that training did not lower."""
    logger.info("trained %s: %s", counted(len(run), "prefix", "prefixes"), run.totals)
    advice = run.advice()
    if len(run) == 1:
        for text in advice.values():
            logger.warning("%s", text)
    elif advice:
        name, text = next(iter(advice.items()))
        logger.warning("%d of %d prefixes: %s (prefix %r)", len(advice), len(run), text, name)
