"""Tables, plot and HTML report of the suite ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixfast.bench.generate_points import OURS, Point
from prefixfast.bench.harness import best_of
from prefixfast.bench.report import Report, markdown, print_report, settings_table, write_report
from prefixfast.io.environment import cpu_name
from prefixfast.io.figures import write_figure


def table(
    points: Sequence[Point], cell: Callable[[Point], str] = lambda p: f"{p.rate:.1f}", corner: str = "tokens/s"
) -> str:
    """Markdown table with a row for each contender and a column for each prefix length.

    Args:
        points: Measured points of one batch size.
        cell: Function from a point to its cell; by default tokens a second in the fastest round.
        corner: Heading of the first column.
    """
    lengths = sorted({p.prefix_length for p in points})
    lines: dict[str, dict[int, str]] = {}
    plain = next((cell(p) for p in points if p.key == (OURS, 0, p.batch)), None)
    named = [p for p in points if p.key.contender != OURS or p.key.distinct]
    for p in sorted(named, key=lambda p: (p.key.contender == OURS, p.key.distinct)):
        # The run without a prefix stands in the row of every number of distinct prefixes.
        start = {0: plain} if p.key.contender == OURS and plain is not None else {}
        lines.setdefault(p.label, start)[p.prefix_length] = cell(p)
    if plain is not None and not any(label.startswith(OURS) for label in lines):
        lines[OURS] = {0: plain}
    return markdown(lines, lengths, corner)


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Write a plot of throughput against prefix length, with a panel for each number of requests."""
    from matplotlib.figure import Figure

    batches = sorted({p.batch for p in points})
    figure = Figure(figsize=(8 if len(batches) == 1 else 6 * len(batches), 4.8), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        here = [p for p in points if p.batch == batch]
        named = [p for p in here if p.prefix_length] or here  # a line begins at its contender's point without a prefix
        for label, contender in {p.label: p.key.contender for p in named}.items():
            own = [p for p in here if p.label == label or (not p.prefix_length and p.key.contender == contender)]
            own.sort(key=lambda p: p.prefix_length)
            style = "o-" if label.startswith(OURS) else "s--"
            axes.plot([p.prefix_length for p in own], [p.rate for p in own], style, label=label)
        axes.set(
            xlabel="prefix length (rows of keys and values)",
            ylabel="generated tokens per second",
            title=f"{batch} requests",
            yscale="log",
        )
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    write_figure(figure, path, dpi=130)


def tables(points: Sequence[Point], rounds: int) -> list[tuple[str, str]]:
    """Caption and Markdown table of rate, time a token and spread, for each number of requests."""
    out = []
    for count in dict.fromkeys(p.batch for p in points):
        here = [p for p in points if p.batch == count]
        out.append((f"{count} requests: tokens a second, {best_of(rounds)}", table(here)))
        latency = table(here, lambda p: f"{p.token_milliseconds:.1f}", "ms")
        out.append((f"{count} requests: milliseconds a token of one request", latency))
        if rounds > 1:
            spread = table(here, lambda p: f"{p.timing.median / p.timing.best:.2f}", "spread")
            out.append((f"{count} requests: median over best round", spread))
    return out


def show(output: Path, points: Sequence[Point], head: Mapping[str, Any], rounds: int) -> None:
    """Print the tables and write ``throughput.png`` and ``report.html``."""
    title = f"{head['prompt']} prompt tokens, {head['new']} new, {head['model']}, {head['dtype']}, {cpu_name()}"
    plot(points, output / "throughput.png", title)
    heading = f"Throughput versus prefix length: {title}"
    aside = ", ".join(f"{name}={value!r}" for name, value in head["set_aside"].items())
    caption = "settings of the contenders" + (
        f"; fields of the base's generation_config that none uses: {aside}" if aside else ""
    )
    shown = [*tables(points, rounds), (caption, settings_table((p.key.contender, p.settings.row()) for p in points))]
    report = Report(heading, shown, output / "throughput.png", head["command"])
    write_report(output / "report.html", report)
    print_report(output, report)
