"""`python -m prefixfast.demo [--model FOLDER_OR_ID] [--output FOLDER]`: run the demo and show it."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

import prefixfast
from prefixfast.bench.generate import measure, plot, table
from prefixfast.bench.harness import cpu_name
from prefixfast.demo.jobs import JOBS
from prefixfast.demo.run import EMBEDDED, LIMITS, SETTINGS, Report, Setting, generate_all, train_jobs


def main(
    model: Annotated[
        str | None, typer.Option(help="a real base: hub id or folder; by default the embedded one")
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for the prefixes and the plot")] = Path("demo-out"),
    samples: Annotated[int, typer.Option(help="rows shown of each job")] = 2,
) -> None:
    """Train three prefixes at once on a frozen base, generate one mixed batch, measure throughput."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    hf_logging.disable_progress_bar()
    console = Console(width=max(100, min(160, Console().width)))
    setting = SETTINGS["real" if model else "embedded"]
    with prefixfast.load(model or str(EMBEDDED), dtype="float32") as base:
        size = sum(p.numel() for p in base.hf.parameters())
        name = model or "embedded"
        console.print(
            f"[bold]Base[/]: {name}, {size / 1e6:.1f} M frozen parameters. [bold]Jobs[/]: "
            + "; ".join(f"{j.name}: {j.about}" for j in JOBS)
        )
        run, seconds = train_jobs(base, setting, output / "prefixes")
        numbers = next(iter(run.values())).num_stored
        console.print(
            f"Trained {len(run)} prefixes at once in {seconds:.0f} s: {setting.fields['prefix_length']} rows, {numbers:,} numbers each "
            f"({100 * numbers / size:.2f} % of the base), final loss "
            + ", ".join(f"{n} {m['loss']:.2f}" for n, m in run.metrics.items())
        )
        report = generate_all(base, run, setting, seconds)
        show(console, report, samples)
    _throughput(console, model or str(EMBEDDED), setting, output)
    console.print(f"Prefixes (PEFT adapter folders): {output / 'prefixes'}")
    if model is None and not report.passed:
        console.print("[bold red]A figure is outside its limit.[/]")
        sys.exit(1)


def show(console: Console, report: Report, samples: int) -> None:
    """Texts side by side, then the figures."""
    for job in JOBS:
        own = [s for s in report.samples if s.job is job][:samples]
        out = Table(title=f"{job.name}: {job.about}", show_lines=True, title_justify="left", title_style="bold")
        for heading in (
            "table (values never seen in training)",
            f"with the {job.name} prefix",
            f"with the {own[0].wrong_job.name} prefix",
            "base alone",
        ):
            out.add_column(heading, ratio=1, overflow="fold")
        for s in own:
            out.add_row("\n".join(f"{k}: {v}" for k, v in s.row["table"].items()), s.text, s.wrong, s.base)
        console.print(out)
    figures = Table(title="Held-out rows", title_justify="left", title_style="bold")
    figures.add_column("share")
    for job in JOBS:
        figures.add_column(job.name, justify="right")
    figures.add_column("limit", justify="right")
    by_job = [report.of(job) for job in JOBS]
    for name, (limit, at_least) in LIMITS.items():
        figures.add_row(NAMES[name], *(f"{f[name]:.3f}" for f in by_job), f"{'>=' if at_least else '<='} {limit:.2f}")
    console.print(figures)
    rate = report.tokens / report.generate_seconds
    console.print(
        f"One mixed batch: {3 * len(report.samples)} requests, {report.tokens} tokens in {report.generate_seconds:.1f} s, {rate:.0f} tokens/s on {cpu_name()}"
    )


NAMES = {
    "coverage": "table values in the text, right prefix",
    "form": "text has the job's form, right prefix",
    "form with another's prefix": "text has the job's form, another job's prefix",
    "base coverage": "table values in the text, base alone",
}


def _throughput(console: Console, model: str, setting: Setting, output: Path) -> None:
    """Throughput versus prefix length on this base; PEFT beside it when it is installed."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval() if find_spec("peft") else None
    with prefixfast.load(hf) as base:
        points = measure(
            base, setting.lengths, (1, setting.work.requests), setting.work, rounds=setting.rounds, plain=plain
        )
    console.print(table(points), markup=False, highlight=False)
    if find_spec("matplotlib"):
        path = output / "throughput.png"
        plot(
            points, path, f"{setting.work.requests} requests, {setting.work.new} new tokens each, float32\n{cpu_name()}"
        )
        console.print(f"Plot: {path}")
    else:
        console.print("matplotlib is not installed: no plot (pip install 'prefixfast[train]')")


if __name__ == "__main__":
    typer.run(main)
