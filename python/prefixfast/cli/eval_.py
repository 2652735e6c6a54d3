"""Command ``prefixfast eval OUTPUTS REFERENCES --task NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixfast.cli.options import words_of
from prefixfast.cli.output import QUIET, printable, show, start_logging
from prefixfast.cli.prefixes import Json
from prefixfast.errors import ConfigError, shown
from prefixfast.io.paths import check_not_input
from prefixfast.io.text import counted
from prefixfast.metrics.tasks import TASK_METRICS

EXAMPLE = """prefixfast eval texts.txt references.txt --task e2e
prefixfast eval texts.jsonl testset_w_refs.csv --task e2e --metrics BLEU,NIST"""
OUTPUTS = """Outputs of any system: a file of rows with the output under 'text', as prefixfast generate writes, or a
file with one text a line."""
OF_TASKS = "; ".join(
    f"{', '.join(task for task, own in TASK_METRICS.items() if own == names)}: {', '.join(names)}"
    for names in dict.fromkeys(TASK_METRICS.values())
)
LONGEST_TOOL = 600  # characters
REFERENCES = """References: an official file of the task, a file of rows, a text file with one reference a line or
with an empty line between the references of two texts, or several text files with one line for each
text."""


def command(
    outputs: Annotated[Path, typer.Argument(metavar="OUTPUTS", help=OUTPUTS)],
    references: Annotated[list[Path], typer.Argument(metavar="REFERENCES...", help=REFERENCES)],
    task: Annotated[
        str,
        typer.Option(help=f"Task, which chooses the metrics: {', '.join(TASK_METRICS)}."),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="Names of metrics or scores with commas between them, as in BLEU,NIST. Each task has metrics of its "
            f"own, and those of other tasks can be named too. Metrics by task: {OF_TASKS}.",
            show_default="all metrics of the task",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split that the official file holds: train, dev or test. Its number of rows is compared with the "
            "official one.",
            show_default="rows as of the test split, any number",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the scores as JSON.", show_default="no file")
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Score the outputs of any system with the metrics of a task's official script.

    Outputs and references are matched by position. Each score has the digits that the script prints, and names the tool
    and the settings that made it. A metric that this machine cannot compute is listed with the reason, and an error if
    --metrics names it.
    """
    from prefixfast.io.atomic import replace_file
    from prefixfast.io.json_lines import json_bytes
    from prefixfast.metrics.evaluate import evaluate
    from prefixfast.metrics.result import ARROWS

    start_logging(quiet=quiet)
    if output is not None and (output.suffix.lower() != ".json" or output.is_dir()):
        msg = f"--output: expected a file ending in .json, got {shown(str(output))}"
        raise ConfigError(msg)
    if output is not None:
        check_not_input("--output", [output], [outputs, *references])
    names = words_of(metrics) if metrics else None
    found = evaluate(outputs, references, task=task, metrics=names, split=split)  # type: ignore[arg-type]
    if output is not None:
        replace_file(output, json_bytes(found.to_json(), indent=2) + b"\n")
    if as_json:
        typer.echo(json_bytes(found.to_json(), indent=2).decode())
        return
    rows = [
        {"score": n, "value": v.text, "better": ARROWS[v.better], "tool": v.tool}
        for n, v in found.values_by_name.items()
    ]
    rows += [
        {"score": n, "value": "-", "better": "", "tool": f"missing: {reason}"} for n, reason in found.missing.items()
    ]
    title = f"{task}, {counted(found.num_texts, 'text')}"
    show(rows, ("score", "value", "better", "tool"), as_json=False, title=title, longest=LONGEST_TOOL)
    if output is not None and not quiet:
        typer.echo(f"{printable(str(output))}: {counted(len(found), 'score')}", err=True)
