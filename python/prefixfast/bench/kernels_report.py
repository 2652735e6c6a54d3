"""Points, table and plot of the suite ``kernels``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixfast.bench.attention_inputs import Shape
from prefixfast.bench.harness import Timing
from prefixfast.io.figures import write_figure

BACKWARD_FACTOR = 3.5  # operations of forward and backward together, as a multiple of the forward's


@dataclass(frozen=True)
class Point:
    """Time of one contender on one shape.

    Attributes:
        shape: The workload.
        contender: Name of the contender.
        work: ``forward``, or ``forward and backward``.
        timing: Seconds of each round, None for a contender that was not timed.
        share: Share of the roofline that the fastest round reaches.
        reason: Reason for which the contender was not timed.
    """

    shape: Shape
    contender: str
    work: str
    timing: Timing | None
    share: float
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """Record of the results file."""
        common = {"shape": vars(self.shape), "contender": self.contender, "work": self.work}
        if self.timing is None:
            return {**common, "not_run": self.reason}
        flops = self.shape.flops * (1.0 if self.work == "forward" else BACKWARD_FACTOR)
        rate = {"tflops": round(flops / self.timing.best / 1e12, 3), "share_of_roofline": round(self.share, 3)}
        return {**common, "seconds": [round(s, 7) for s in self.timing.seconds], **rate}


def table(points: list[Point]) -> str:
    """Markdown table of milliseconds in the fastest round, their spread, and the ratio to prefixfast."""
    lines = [
        "| shape | work | contender | ms | median / best | times prefixfast | share of roofline |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    base = {(p.shape, p.work): p.timing.best for p in points if p.contender == "prefixfast" and p.timing}
    for p in points:
        if p.timing is None:
            lines.append(f"| {p.shape.name} | | {p.contender} | not run: {p.reason} | | | |")
        else:
            best, ratio = p.timing.best, p.timing.best / base[p.shape, p.work]
            spread = f"{p.timing.median / best:.2f}" if len(p.timing.seconds) > 1 else ""
            cells = (f"{best * 1e3:.3f}", spread, f"{ratio:.2f}", f"{100 * p.share:.0f} %")
            lines.append(f"| {p.shape.name} | {p.work} | {p.contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(points: list[Point], path: Path, title: str) -> None:
    """Write a plot of each contender's time relative to prefixfast, with a group of bars for each shape."""
    from matplotlib.figure import Figure

    works = list(dict.fromkeys(p.work for p in points if p.timing))
    figure = Figure(figsize=(9, 3.6 * len(works)), layout="constrained")
    for axes, work in zip(figure.subplots(len(works), squeeze=False)[:, 0], works, strict=True):
        own = [p for p in points if p.timing and p.work == work]
        shapes = list(dict.fromkeys(p.shape for p in own))
        names = list(dict.fromkeys(p.contender for p in own))
        base = {p.shape: p.timing.best for p in own if p.contender == "prefixfast" and p.timing}
        for i, name in enumerate(names):
            found = {p.shape: p.timing.best for p in own if p.contender == name and p.timing}
            heights = [found[s] / base[s] if s in found else 0.0 for s in shapes]
            axes.bar([j + 0.8 * i / len(names) for j in range(len(shapes))], heights, 0.8 / len(names), label=name)
        axes.set(ylabel="time, prefixfast = 1", title=f"{work}\n{title}")
        ticks = [j + 0.4 for j in range(len(shapes))]
        axes.set_xticks(ticks, [s.name.replace(", ", "\n", 1) for s in shapes], fontsize="x-small")
        axes.legend(fontsize="x-small")
    write_figure(figure, path, dpi=130)
