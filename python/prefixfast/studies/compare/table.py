"""Tables of a comparison, as cells and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prefixfast.io.text import counted
from prefixfast.studies.compare.summary import FEWEST_SEEDS, MethodResult, Spread, Summary

Row = Mapping[str, str]


def quality_rows(summary: Summary, names: Sequence[str], *, is_long: bool = False) -> list[Row]:
    """Cells of loss and scores, a row for each method.

    Args:
        summary: Summary of the comparison.
        names: Names of the columns.
        is_long: Whether cells also hold smallest and largest value.
    """
    return [
        {
            "method": m.label,
            "seeds": str(len(m.seeds)),
            **{n: _spread(m.quality[n], number, is_long=is_long) if n in m.quality else "-" for n in names},
        }
        for m in summary.methods
    ]


def cost_rows(summary: Summary, memory: float, *, is_long: bool = False) -> list[Row]:
    """Cells of the costs of one user, a row for each method.

    Args:
        summary: Summary of the comparison.
        memory: Memory, in bytes, into which users are counted.
        is_long: Whether cells of seconds also hold smallest and largest value.
    """

    def cell(method: MethodResult, name: str, write: Callable[[float], str]) -> str:
        found = method.costs.get(name)
        if found is None:
            return "-"
        return _spread(found, write, is_long=True) if is_long and write is number else write(found.mean)

    return [
        {
            "method": m.label,
            **{TITLES.get(name, name): cell(m, name, write) for name, write in WRITTEN.items()},
            f"users in {in_units(memory)}": f"{m.users(memory):,}",
        }
        for m in summary.methods
    ]


def markdown(summary: Summary, memory: float) -> str:
    """Report of a comparison as Markdown.

    Args:
        summary: Summary of the comparison.
        memory: Memory, in bytes, into which users are counted.
    """
    parts = ["# Comparison of methods", f"{summary.title}.", "## Quality"]
    parts.append(_table(quality_rows(summary, summary.qualities, is_long=True)))
    parts.append(_spread_note(summary))
    parts += [f"No score of {name}: {reason}." for name, reason in summary.missing.items()]
    parts += ["## Clear differences", *_differences(summary)]
    parts += ["## Costs of one user", _table(cost_rows(summary, memory, is_long=True))]
    return "\n\n".join(parts) + "\n"


def number(value: float) -> str:
    """Number with four significant digits, and an exponent below 0.0001."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")


def in_units(count: float) -> str:
    """Size or number with a decimal unit, such as ``1.2 MB``, as disks and memory are sold."""
    return f"{_scaled(count)}B"


def _scaled(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} T"


def _count(value: float) -> str:
    """Number of parameters, such as ``1.2 M``."""
    return _scaled(value).strip()


TITLES = {"disk bytes": "disk size", "peak bytes": "peak memory"}  # of columns whose cells have a unit
WRITTEN: dict[str, Callable[[float], str]] = {
    "trained": _count,
    "stored": _count,
    "disk bytes": in_units,
    "train s": number,
    "s/step": number,
    "peak bytes": in_units,
    "s/text": number,
}


def _spread(spread: Spread, write: Callable[[float], str], *, is_long: bool) -> str:
    if spread.deviation is None:
        return write(spread.mean)
    text = f"{write(spread.mean)} ± {spread.deviation:.2g}"
    return f"{text} ({write(min(spread.values))} to {write(max(spread.values))})" if is_long else text


def _spread_note(summary: Summary) -> str:
    counts = sorted({len(m.seeds) for m in summary.methods})
    one = "A method with one seed has no spread." if 1 in counts else ""
    if counts == [1]:
        return one
    return f"Mean ± standard deviation over the seeds, and smallest to largest value. {one}".strip()


def _differences(summary: Summary) -> list[str]:
    enough = [m.label for m in summary.methods if len(m.seeds) >= FEWEST_SEEDS]
    if len(enough) < 2:
        return [f"None: fewer than two methods have {counted(FEWEST_SEEDS, 'seed')} or more."]
    lines = []
    for name in summary.qualities:
        worse: dict[str, list[str]] = {}
        for better, other in summary.clear_differences(name):
            worse.setdefault(better, []).append(other)
        found = "; ".join(f"{better} better than {', '.join(others)}" for better, others in worse.items())
        lines.append(f"* {name}: {found or 'none'}.")
    head = (
        "A difference is clear if every seed of one method is better than every seed of the other. Methods with fewer "
        f"than {FEWEST_SEEDS} seeds are left out."
    )
    return [head, "\n".join(lines)]


def _table(rows: Sequence[Row]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows)])
