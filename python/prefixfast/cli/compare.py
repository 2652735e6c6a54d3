"""Command ``prefixfast compare ROWS``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.columns import PROMPT, SPLIT, TABLE, TARGET, TASK, column_arguments
from prefixfast.cli.generate import ENCODING, FORMATS
from prefixfast.cli.options import flags, words_of
from prefixfast.cli.output import QUIET, SOME_FAILED, printable, show, start_logging
from prefixfast.cli.prefixes import Json
from prefixfast.config import GenerationParams, TrainConfig
from prefixfast.config.sites import SITES
from prefixfast.errors import ConfigError, named_errors, shown
from prefixfast.io.atomic import replace_file
from prefixfast.io.paths import check_not_input
from prefixfast.io.text import counted, duration
from prefixfast.model.base_name import check_base_name
from prefixfast.studies.compare.variants import METHOD_NAMES, VARIANTS

if TYPE_CHECKING:
    from prefixfast.studies.compare.study import Study, StudyRun
    from prefixfast.studies.compare.summary import Summary

EXAMPLE = """prefixfast compare rows.jsonl --model gpt2 -o comparison --methods prefix,lora
prefixfast compare rows.jsonl --model gpt2 -o c --set prefix.prefix_length=20"""
SHOWN_SCORES = 6  # columns of the table of quality; table.md has all scores
GIGABYTE = 1e9
TIMES = ("train", "evaluate", "generate")  # of a run
MODEL = typer.Option(help="Hub id or folder of the base model.")
NAMED = ", ".join(f"{name} ({', '.join(f'{k} {v}' for k, v in own.items())})" for name, own in VARIANTS.items())
METHODS = typer.Option(
    help=f"Methods with commas between them: {', '.join(METHOD_NAMES)}, or with options {NAMED}. Encoder-decoder bases "
    "have the methods prefix, full, lora and prefix+lora, and they alone have the sites enc and cross."
)
METHODS_BY_DEFAULT = ["prefix,lora,full"]
SETTINGS = typer.Option(
    "--set", help="Option of one method as METHOD.OPTION=VALUE, as in lora.lora_rank=4.", show_default="no option"
)
SEEDS = typer.Option(help="Number of seeds of each method, counted from --seed.", min=1)
OUTPUT = typer.Option(
    "-o",
    "--output",
    help="Folder of results.jsonl, table.md, compare.png, and of what each method trains and generates. Runs that it "
    "holds are not run again, and an interrupted one continues.",
)
EVAL_DATA = typer.Option(
    help="File of held-out rows.", show_default="a fifth of the inputs, or --eval-fraction of them"
)
MAX_ROWS = typer.Option(help="Largest number of training rows, drawn at random.", min=1, show_default="all rows")
MAX_INPUTS = typer.Option(
    help="Largest number of held-out inputs, drawn at random, with all rows of each.", min=1, show_default="all inputs"
)
METRICS = typer.Option(
    help="Metrics or scores with commas between them, as in BLEU,TER.", show_default="those of the task"
)
MEMORY = typer.Option(help="Memory in GB (1e9 bytes), into which users are counted beside the base.", min=0)
TABLE_FILE, PLOT_FILE = "table.md", "compare.png"  # in the output folder
DRY_RUN = typer.Option(
    "--dry-run",
    help="Print the runs and their times, estimated from two steps and eight texts of the base, and write nothing.",
)


@flags(TrainConfig, GenerationParams)
def command(
    rows_file: Annotated[str, typer.Argument(metavar="ROWS", help=f"File of rows with input and target ({FORMATS}).")],
    model: Annotated[str, MODEL],
    output: Annotated[Path, OUTPUT] = Path("comparison"),
    methods: Annotated[list[str], METHODS] = METHODS_BY_DEFAULT,
    seeds: Annotated[int, SEEDS] = 3,
    settings: Annotated[list[str] | None, SETTINGS] = None,
    task: Annotated[str | None, TASK] = None,
    prompt: Annotated[str | None, PROMPT] = None,
    target: Annotated[str | None, TARGET] = None,
    table: Annotated[str | None, TABLE] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    split: Annotated[str | None, SPLIT] = None,
    eval_data: Annotated[str | None, EVAL_DATA] = None,
    max_rows: Annotated[int | None, MAX_ROWS] = None,
    max_inputs: Annotated[int | None, MAX_INPUTS] = None,
    metrics: Annotated[list[str] | None, METRICS] = None,
    memory: Annotated[float, MEMORY] = 16,
    dry_run: Annotated[bool, DRY_RUN] = False,
    as_json: Json = False,
    quiet: Annotated[bool, QUIET] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Compare methods on the same rows: quality with its spread over seeds, and bytes and seconds of a user.

    Each method and seed is a run, which trains, generates a text for each distinct held-out input and is evaluated in
    a process of its own. The options below apply to all methods. The exit status is 3 if some runs failed.
    """
    given = dict(locals())
    from prefixfast.studies.compare.rows import read_study_rows
    from prefixfast.studies.compare.runner import FAILED, RESULTS, make_runs, read_results
    from prefixfast.studies.compare.scores import check_metrics
    from prefixfast.studies.compare.variants import read_variants

    start_logging(quiet=quiet)
    written = [output / name for name in (RESULTS, FAILED, TABLE_FILE, PLOT_FILE)]
    check_not_input("--output", written, filter(None, (rows_file, eval_data)))
    check_base_name(model)
    read_results(output)  # refused before any work if it holds something else
    variants = read_variants(",".join(methods), settings or [])
    study, first = _study(given, fields)
    rows = read_study_rows(study)
    runs = make_runs(study, rows, variants, range(first, first + seeds))
    check_metrics(study, rows)
    _check(runs[: len(variants)], rows.task.name)
    if dry_run:
        _print_estimates(runs, as_json=as_json)
        return
    _run_and_show(runs, output, memory * GIGABYTE, as_json=as_json, quiet=quiet)


def _study(given: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[Study, int]:
    """Settings of the comparison and the first seed."""
    from prefixfast.studies.compare.study import Study

    training = {n: v for n, v in fields.items() if n in TrainConfig.names()}
    decoding = {n: v for n, v in fields.items() if n not in TrainConfig.names()}
    GenerationParams.make(decoding)
    config = TrainConfig.make(training)
    first, fraction = training.pop("seed", config.seed), training.pop("eval_fraction", None)
    if fraction and given["eval_data"] is not None:
        msg = "--eval-fraction and --eval-data: expected one of them, got both"
        raise ConfigError(msg)
    metrics = given["metrics"]
    study = Study(
        model=given["model"],
        data=given["rows_file"],
        eval_data=given["eval_data"],
        reading={
            "task": given["task"],
            "encoding": given["encoding"],
            "split": given["split"],
            **column_arguments(given["prompt"], given["target"], given["table"]),
        },
        train=training,
        decoding=decoding,
        metrics=words_of(metrics) if metrics else None,
        max_rows=given["max_rows"],
        max_inputs=given["max_inputs"],
        **({"eval_fraction": fraction} if fraction else {}),
    )
    return study, first


def _check(runs: Sequence[StudyRun], task: str) -> None:
    """Raise `ConfigError` for options and a base that do not fit the method, before any run starts."""
    from prefixfast.training.settings import GivenOptions, resolve_settings

    settings = []
    for run in runs:
        arguments, fields = run.train_arguments()
        with _named(run):
            settings.append(resolve_settings(GivenOptions(fields=fields, **arguments), task))

    # The kind of the base comes last, since reading it imports transformers.
    from prefixfast.model.load import is_seq2seq_base
    from prefixfast.training.method import check_seq2seq_method

    is_seq2seq = is_seq2seq_base(runs[0].study.model)
    for run, found in zip(runs, settings, strict=True):
        with _named(run):
            found.prefix_config.sites_of(SITES if is_seq2seq else ("self",))
            if is_seq2seq:
                check_seq2seq_method(run.variant.options["method"])


def _named(run: StudyRun) -> contextlib.AbstractContextManager[None]:
    """Context manager whose `ConfigError` names the compared method."""
    return named_errors(f"method {shown(run.variant.name)}: ", ConfigError)


def _print_estimates(runs: Sequence[StudyRun], *, as_json: bool) -> None:
    """Print the estimated time of each run and of all runs."""
    from prefixfast.studies.compare.estimate import estimate_runs
    from prefixfast.studies.compare.table import in_units, number

    found = estimate_runs(runs)
    total = sum(e.get(f"{what}_seconds", 0) for e in found for what in TIMES)
    if as_json:
        typer.echo(json.dumps({"runs": found, "seconds": total}, indent=2))
        return
    rows = [
        {
            "run": e["run"],
            "steps": e["steps"],
            "learning rate": e["learning_rate"],
            "s/step": number(e["seconds_per_step"]),
            **{what: duration(e[f"{what}_seconds"]) for what in TIMES},
            "peak": in_units(e["peak_bytes"]),
        }
        for e in found
        if "error" not in e
    ]
    if rows:
        show(rows, rows[0], as_json=False)
    _print_failed({e["run"]: e["error"] for e in found if "error" in e})
    typer.echo(f"{counted(len(runs), 'run')}, {duration(total)}; loading and metrics come on top")
    if len(rows) < len(found):
        raise typer.Exit(SOME_FAILED)


def _run_and_show(runs: Sequence[StudyRun], output: Path, memory: float, *, as_json: bool, quiet: bool) -> None:
    """Carry out the runs, print and write the results, and exit with 3 if some runs failed."""
    from prefixfast.studies.compare.runner import RESULTS, Runner, read_results
    from prefixfast.studies.compare.summary import summarize
    from prefixfast.studies.compare.table import markdown

    def report(line: str) -> None:
        if not quiet:
            typer.echo(printable(line), err=True)

    try:
        failed = Runner(output, report, False if quiet else None).run(runs)
    except KeyboardInterrupt:
        report(f"stopped; the same command goes on from the runs in {output}")
        raise
    lines = [line for line in read_results(output) if line["shared"] == runs[0].shared]
    if lines:
        summary = summarize(lines, runs[0].shared)
        replace_file(output / TABLE_FILE, markdown(summary, memory).encode())
        plot = _draw(summary, output / PLOT_FILE)
        files = {"results": output / RESULTS, "table": output / TABLE_FILE, "plot": plot}
        _show(summary, memory, {n: None if f is None else str(f) for n, f in files.items()}, failed, as_json=as_json)
    _print_failed(failed)
    if failed:
        raise typer.Exit(SOME_FAILED)


def _print_failed(failed: Mapping[str, str]) -> None:
    """Print each error once, with the runs that it ended."""
    runs: dict[str, list[str]] = {}
    for label, error in failed.items():
        runs.setdefault(error, []).append(label)
    for error, labels in runs.items():
        others = f" and {counted(len(labels) - 1, 'other run')}" if len(labels) > 1 else ""
        typer.echo(f"{printable(labels[0])}{others} failed: {printable(error)}", err=True)


def _draw(summary: Summary, path: Path) -> Path | None:
    """Path of the drawn plot, None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from prefixfast.studies.compare.plot import plot

    plot(summary, path)
    return path


def _show(
    summary: Summary, memory: float, files: Mapping[str, str | None], failed: Mapping[str, str], *, as_json: bool
) -> None:
    from prefixfast.studies.compare.table import cost_rows, quality_rows

    if as_json:
        methods = [
            {
                "method": m.label,
                "seeds": m.seeds,
                "quality": {n: s.to_json() for n, s in m.quality.items()},
                "costs": {n: s.to_json() for n, s in m.costs.items()},
                "users": m.users(memory),
            }
            for m in summary.methods
        ]
        own = {"title": summary.title, "missing": dict(summary.missing), "failed": dict(failed), "methods": methods}
        typer.echo(json.dumps(own | dict(files), indent=2))
        return
    typer.echo(printable(summary.title))
    names = summary.qualities[:SHOWN_SCORES]
    for rows in (quality_rows(summary, names), cost_rows(summary, memory)):
        typer.echo()
        show(rows, rows[0], as_json=False)
    if all(len(m.seeds) == 1 for m in summary.methods):
        typer.echo("\none seed: no spread")
    typer.echo(
        "\n" + ", ".join(printable(f) if f else "no plot (pip install 'prefixfast[train]')" for f in files.values())
    )
