"""Command ``prefixfast data check TASK PATH``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.generate import FORMATS
from prefixfast.cli.help import Command, Group
from prefixfast.cli.prefixes import Json
from prefixfast.errors import ConfigError, shown

if TYPE_CHECKING:
    from prefixfast.data.check_data import DataReport

EXAMPLE = "prefixfast data check auto rows.jsonl --model gpt2"
app = typer.Typer(cls=Group, help="Check data before training on it.", epilog=EXAMPLE, no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Check data before training on it."""


@app.command("check", cls=Command, epilog=EXAMPLE)
def check_rows(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="Task that turns rows into text: e2e, webnlg, dart, table, summary, xsum, prompt, messages or text; "
            "auto finds it from the rows' keys.",
        ),
    ],
    path: Annotated[Path, typer.Argument(metavar="PATH", help=f"File of rows ({FORMATS}).")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of the base whose tokens are counted; its weights are not read.",
            show_default="no tokens are counted",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of tokens above which an example counts as too long. Needs --model. In training the "
            "prefix takes positions too, so that an example that fits here can be too long there.",
            show_default="all positions of the model",
        ),
    ] = None,
    max_errors: Annotated[int, typer.Option(min=0, help="Number of problems to list; all are counted.")] = 100,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the task's official file (E2E .csv, WebNLG .json, DART .json): train, dev or test.",
            show_default="PATH is a file of rows",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List every problem of a file of rows with its line, the rows' lengths, and one example as the model reads it.

    The exit status is 1 if there are problems.
    """
    from prefixfast.data.check_data import BaseVocabulary, check_data

    if max_length is not None and model is None:
        msg = "--max-length: expected together with --model, whose tokens it counts"
        raise ConfigError(msg)
    base = _tokenizer_and_sizes(model) if model is not None else {}
    if max_length is not None:
        base["max_length"] = max_length
    name = None if task == "auto" else task
    report = check_data(name, path, split=split, base=BaseVocabulary(**base), max_errors=max_errors)
    typer.echo(json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else "\n".join(_lines(report)))
    if report.num_problems:
        raise typer.Exit(1)


def _tokenizer_and_sizes(model: str) -> dict[str, Any]:
    """Tokenizer, vocabulary size and positions of a base, without its weights."""
    from transformers import AutoConfig

    from prefixfast.model.tokenizer import Tokenizer, read_tokenizer

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as e:
        msg = f"model: the config of {shown(model)} cannot be loaded: {e}"
        raise ConfigError(msg) from e
    return {
        "tokenizer": Tokenizer.from_hf(read_tokenizer(model)),
        "vocab_size": int(config.vocab_size),
        "max_length": int(config.max_position_embeddings),
    }


def _lines(report: DataReport) -> list[str]:
    """Report as lines of text."""
    out = []
    for p in report.problems:
        placed = p["line"] is None or f":{p['line']}: " in p["message"]
        out.append(p["message"] if placed else f"{report.path}:{p['line']}: {p['message']}")
    if (more := report.num_problems - len(report.problems)) > 0:
        out.append(f"... and {more} more")
    counts = f"{report.rows} rows, {report.examples} examples, {report.num_problems} problems"
    out.append(f"{report.path}: task {report.task}, {counts}")
    for unit, of in (("characters", report.characters), ("tokens", report.tokens)):
        for name, at in of.items():
            out.append(f"  {unit} of the {name}: " + ", ".join(f"{v} at {p} %" for p, v in at.items()))
    if report.tokens and report.max_length:
        out.append(f"  over {report.max_length} tokens: {report.too_long} examples")
    if report.unread:
        out.append(f"  unused columns: {', '.join(report.unread)}")
    if report.example:
        out += [
            f"  line {report.example['line']} becomes",
            f"    prompt {report.example['prompt']!r:.600}",
            f"    target {report.example['target']!r:.600}",
        ]
    return out
