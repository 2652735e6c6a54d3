"""Printed report of the demo: plan, training, sample texts, figures, throughput and files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prefixfast.bench.generate import Workload
from prefixfast.bench.generate_points import Point
from prefixfast.bench.generate_report import plot, table
from prefixfast.demo.run import Report, Setting
from prefixfast.io.environment import cpu_name

WIDTH = 110
LONGEST = 120  # characters of a sample without a prefix
NUMBERS = {2: "two", 3: "three"}
FIGURES = {
    "coverage": "table values in the text, own prefix",
    "form": "texts in the job's form, own prefix",
    "form with another's prefix": "texts in the job's form, another job's prefix",
    "base coverage": "table values in the text, no prefix",
    "base form": "texts in the job's form, no prefix",
}


class Printer:
    """Prints the parts of the report.

    Args:
        output: Folder of the demo's files.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.console = Console(width=WIDTH, highlight=False)

    def plan(self, name: str, size: int, compute: str, setting: Setting) -> None:
        """Print base, compute dtype and jobs."""
        self._print(f"Base: {name}, {size / 1e6:.1f} million parameters, all of them frozen, {compute}.")
        steps, rows = setting.fields["max_steps"], setting.train_rows
        count = NUMBERS[len(setting.jobs)]
        self._print(f"Training {count} prefixes in the same batches, {steps} steps, {rows:,} rows each:")
        for job in setting.jobs:
            self._print(f"  {job.name:9} {job.about}")

    def training(self, run: Any, seconds: float, size: int) -> None:
        """Print time, size and loss of the prefixes."""
        prefix = next(iter(run.values()))
        losses = ", ".join(f"{name} {m['loss']:.2f}" for name, m in run.metrics.items())
        share = f"{100 * prefix.num_stored / size:.2g} % of the base"
        self._print(
            f"Trained in {seconds:.0f} s. Each prefix has {_rows(prefix)}, {prefix.num_stored:,} numbers ({share}). "
            f"Final loss: {losses}."
        )

    def samples(self, report: Report, count: int) -> None:
        """Print texts of held-out rows: with the job's prefix, with another job's, and without a prefix."""
        rate = report.tokens / report.generate_seconds
        self._print(
            f"\nGenerated {3 * len(report.samples)} texts in one mixed batch: {report.tokens:,} tokens in "
            f"{report.generate_seconds:.1f} s, {rate:.0f} tokens/s. Samples, from values that no training row has:"
        )
        out = Table(show_lines=True)
        out.add_column("job")
        for heading in ("table", "text with the job's prefix", "text with another job's prefix", "text without prefix"):
            out.add_column(heading, ratio=1, overflow="fold")
        for job in report.jobs:
            for s in [s for s in report.samples if s.job is job][:count]:
                values = "\n".join(f"{k}: {v}" for k, v in s.row["table"].items())
                plain = textwrap.shorten(s.base, LONGEST, placeholder=" ...")
                out.add_row(job.name, values, s.text, f"({s.wrong_job.name}) {s.wrong}", plain)
        self.console.print(out, markup=False)

    def figures(self, report: Report) -> None:
        """Print shares over all held-out rows, with their limits."""
        out = Table("share of the held-out rows", *(job.name for job in report.jobs), "limit")
        for column in out.columns[1:]:
            column.justify = "right"
        by_job = [report.of(job) for job in report.jobs]
        for name, (limit, at_least) in report.limits.items():
            shares = (f"{figures[name]:.3f}" for figures in by_job)
            out.add_row(FIGURES[name], *shares, f"{'at least' if at_least else 'at most'} {limit:.2f}")
        self.console.print(out)

    def throughput(self, points: Sequence[Point], work: Workload) -> None:
        """Print tokens a second by prefix length and write the plot."""
        title = f"{work.requests} requests, {work.new} new tokens each, float32, {cpu_name()}"
        against = " against PEFT" if find_spec("peft") else " (pip install peft to compare with it)"
        self._print(f"\nThroughput of generation{against}, tokens/s by prefix length P; {title}:")
        heading, _, *lines = ([c.strip() for c in line.strip("|").split("|")] for line in table(points).splitlines())
        out = Table(*heading)
        for column in out.columns[1:]:
            column.justify = "right"
        for line in lines:
            out.add_row(*line)
        self.console.print(out, markup=False)
        for dtype, use_cache, decoding in dict.fromkeys(
            (p.settings.dtype, p.settings.use_cache, p.settings.decoding) for p in points
        ):
            self._print(f"Settings of the contenders: {dtype}, use_cache={use_cache}, {decoding}.")
        if find_spec("matplotlib"):
            plot(points, self.output / "throughput.png", title)

    def costs(self, run: Any, base: Any, tokens: float) -> None:
        """Print the memory of each prefix, and of the keys and values of a request's table.

        Args:
            run: Trained prefixes by job.
            base: Attached encoder-decoder base.
            tokens: Mean number of tokens of a table.
        """
        layers = base.sites["cross"]
        table = tokens * sum(shape.row_numbers for shape in layers) * base.dtype.itemsize
        self._print("\nMemory beside the base:")
        for name, prefix in run.items():
            self._print(f"  prefix {name:9} {prefix.nbytes / 1e3:5.0f} kB: {_rows(prefix)}, read by all its requests")
        self._print(f"  a table of {tokens:.0f} tokens {table / 1e3:5.0f} kB: computed once, read by all beams")

    def files(self, *, has_plot: bool) -> None:
        """Print the files that were written.

        Args:
            has_plot: Whether the throughput was measured.
        """
        kind = "as PEFT adapter folders" if has_plot else "as folders"
        self._print(f"\nPrefixes, {kind}: {self.output / 'prefixes'}")
        if has_plot:
            path = self.output / "throughput.png"
            self._print(f"Plot: {path}" if find_spec("matplotlib") else "No plot: pip install matplotlib")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False)


def _rows(prefix: Any) -> str:
    """Number of rows, at each site where there are several."""
    if len(prefix.sites) == 1:
        return f"{prefix.num_rows} rows"
    return f"{' + '.join(str(prefix.length_at(site)) for site in prefix.sites)} rows ({', '.join(prefix.sites)})"
