"""Plot of a comparison: loss and the first score against the bytes of one user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError
from prefixfast.io.figures import write_figure
from prefixfast.io.text import counted
from prefixfast.studies.compare.summary import LOSS, MethodResult, Summary
from prefixfast.studies.compare.table import in_units

MARKERS = "osD^vPX<>*hp"
MARKER_WIDTH = 0.02  # of the width of the axis


def plot(summary: Summary, path: Path) -> None:
    """Write the plot of a comparison, with a bar from the smallest to the largest value over the seeds.

    Args:
        summary: Summary of the comparison.
        path: Path of the image.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError as e:
        msg = "plot: matplotlib is not installed: pip install 'prefixfast[train]'"
        raise ConfigError(msg) from e
    names = [LOSS, *(n for n in summary.qualities if n != LOSS)][:2]
    places = _places([m.costs["disk bytes"].mean for m in summary.methods])
    figure = Figure(figsize=(5 * len(names) + 1, 4.8), layout="constrained")
    panels: Any = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for i, (method, place) in enumerate(zip(summary.methods, places, strict=True)):
            if name in method.quality:
                _point(axes, method, name, place, i)
        better = "lower" if name == LOSS else "higher"
        axes.set(xlabel="size on disk of one user", ylabel=name, xscale="log")
        axes.set_xlim(min(places) / 3, max(places) * 3)
        axes.set_title(f"{name} ({better} is better)", fontsize="medium")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_units(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(y=0.15)
        axes.grid(visible=True, which="major", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize="small")
    bars = "\npoints are means, bars go from the smallest to the largest value of the seeds"
    figure.suptitle(_two_lines(summary.title) + bars, fontsize="small")
    write_figure(figure, path, dpi=130)


def _places(sizes: Sequence[float]) -> list[float]:
    """Place of each method on the axis: its size, moved a little where another method has almost the same."""
    width = math.log10(max(sizes) / min(sizes)) + 1
    found: list[float] = []
    for size in sizes:
        others = sum(abs(math.log10(size / other)) < MARKER_WIDTH * width for other in sizes[: len(found)])
        found.append(size * 10 ** (MARKER_WIDTH * width * others))
    return found


def _point(axes: Any, method: MethodResult, name: str, place: float, number: int) -> None:
    """Mean of one method, with a bar over its seeds."""
    spread = method.quality[name]
    low, high = spread.mean - min(spread.values), max(spread.values) - spread.mean
    axes.errorbar(
        place,
        spread.mean,
        yerr=[[low], [high]] if spread.deviation is not None else None,
        fmt=MARKERS[number % len(MARKERS)],
        color=f"C{number % 10}",
        capsize=4,
        markersize=7,
        label=f"{method.label} ({counted(len(method.seeds), 'seed')})",
    )


def _two_lines(title: str) -> str:
    """Title broken into two lines."""
    parts = title.split(", ")
    half = len(parts) // 2
    return ", ".join(parts[:half]) + ",\n" + ", ".join(parts[half:])
