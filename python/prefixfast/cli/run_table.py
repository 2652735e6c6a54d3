"""Table of the prefixes of a training run, sorted by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixfast.cli.output import show

if TYPE_CHECKING:
    from prefixfast import TrainRun

ALWAYS = ("examples", "steps", "first_loss", "loss")
SOMETIMES = ("eval_rows", "eval_loss_before", "eval_loss", "skipped_rows", "truncated_rows", "skipped_steps")
TRAINED, UNCHANGED = "trained", "unchanged"


def print_table(run: TrainRun) -> None:
    """Print the metrics of every prefix: a table on a terminal, tab-separated lines in a pipe.

    Args:
        run: Result of the run. A column of `SOMETIMES` is shown if one of its numbers is not 0.
    """
    columns = [*ALWAYS, *(c for c in SOMETIMES if any(m.get(c) for m in run.metrics.values()))]
    rows = [
        {
            "prefix": name,
            "result": UNCHANGED if name in run.unchanged else TRAINED,
            **{c: _cell(run.metrics[name].get(c)) for c in columns},
        }
        for name in sorted(run)
    ]
    show(rows, ("prefix", "result", *columns), as_json=False)


def _cell(value: float | None) -> str:
    """Number of a cell; a metric that the prefix does not have is a dash."""
    return "-" if value is None else f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
