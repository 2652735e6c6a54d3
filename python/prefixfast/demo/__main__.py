"""Entry point of ``python -m prefixfast.demo [--seq2seq] [--model MODEL] [--output FOLDER]``."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging as hf_logging

import prefixfast
from prefixfast.demo import BASE, SEQ2SEQ_BASE
from prefixfast.demo.report import Printer
from prefixfast.demo.run import SETTINGS, generate_all, measure_throughput, train_jobs
from prefixfast.model.base import compute_line


def main(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of another base.", show_default="the embedded base")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the prefixes and the plot.")] = Path("demo-out"),
    samples: Annotated[int, typer.Option(min=1, help="Number of sample texts for each job.")] = 2,
    seq2seq: Annotated[bool, typer.Option("--seq2seq", help="Take an encoder-decoder base, and beam search.")] = False,
) -> None:
    """Train prefixes at once on a frozen base, generate with them in one mixed batch, measure throughput."""
    _silence_libraries()
    printer = Printer(output)
    setting = SETTINGS[("real" if model else "embedded", seq2seq)]
    path, name = (SEQ2SEQ_BASE, "the embedded BART") if seq2seq else (BASE, "the embedded Llama")
    with prefixfast.load(model or str(path), dtype="float32") as base:
        size = base.hf.num_parameters()
        printer.plan(model or name, size, compute_line(base), setting)
        run, seconds = train_jobs(base, setting, output / "prefixes")
        printer.training(run, seconds, size)
        report = generate_all(base, run, setting, seconds)
        printer.samples(report, samples)
        printer.figures(report)
        if seq2seq:
            printer.costs(run, base, report.prompt_tokens)
    if setting.work is not None:
        printer.throughput(measure_throughput(model or str(path), setting, setting.work), setting.work)
    printer.files(has_plot=setting.work is not None)
    if model is None and not report.passed:
        sys.exit("A figure is outside its limit.")


def _silence_libraries() -> None:
    """Hide log lines, warnings and progress bars of other libraries, which say nothing about the demo."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    typer.run(main)
