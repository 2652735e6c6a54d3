"""`prefixfast data check TASK PATH`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.errors import ConfigError

if TYPE_CHECKING:
    from prefixfast.training.check_data import Report

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at data before training on it."""


@app.command("check")
def check(
    task: Annotated[
        str,
        typer.Argument(
            help="a task's name (e2e, webnlg, dart, table, summary, xsum, prompt, messages, text), or auto: told by the rows' keys"
        ),
    ],
    path: Annotated[Path, typer.Argument(help="rows (.jsonl .json .csv .parquet, also .gz)")],
    model: Annotated[
        str | None, typer.Option(help="hub id or folder of the base: count its tokens (its weights are not read)")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="longest example in tokens; by default the model's positions, of which the prefix takes some"
        ),
    ] = None,
    max_errors: Annotated[int, typer.Option(min=0, help="problems to list; all are counted")] = 100,
    split: Annotated[
        str | None,
        typer.Option(help="read the task's official file (E2E .csv, WebNLG .json, DART .json) as train, dev or test"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Every problem with its line, lengths, and one example as the model would see it. Exit status 1 if there are problems."""
    from prefixfast.training.check_data import check as run

    if max_length is not None and model is None:
        msg = "--max-length: expected together with --model, whose tokens it counts"
        raise ConfigError(msg)
    base = _base(model) if model is not None else {}
    if max_length is not None:
        base["max_length"] = max_length
    report = run(None if task == "auto" else task, path, split=split, max_errors=max_errors, **base)
    typer.echo(json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else "\n".join(_lines(report)))
    if report.num_problems:
        raise typer.Exit(1)


def _base(model: str) -> dict[str, Any]:
    """Tokenizer and sizes of a base, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    from prefixfast.model.tokenizer import Tokenizer

    try:
        config, tokenizer = AutoConfig.from_pretrained(model).get_text_config(), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as e:
        msg = f"model: {model!r}: tokenizer and config cannot be loaded: {e}"
        raise ConfigError(msg) from e
    return {
        "tokenizer": Tokenizer.from_hf(tokenizer),
        "vocab_size": int(config.vocab_size),
        "max_length": int(config.max_position_embeddings),
    }


def _lines(report: Report) -> list[str]:
    out = [
        f"{p['message']}"
        if p["line"] is None or f":{p['line']}: " in p["message"]
        else f"{report.path}:{p['line']}: {p['message']}"
        for p in report.problems
    ]
    if (more := report.num_problems - len(report.problems)) > 0:
        out.append(f"... and {more} more")
    out.append(
        f"{report.path}: task {report.task}, {report.rows} rows, {report.examples} examples, {report.num_problems} problems"
    )
    for unit, of in (("characters", report.characters), ("tokens", report.tokens)):
        for name, at in of.items():
            out.append(f"  {unit} of the {name}: " + ", ".join(f"{v} at {p} %" for p, v in at.items()))
    if report.tokens and report.max_length:
        out.append(f"  over {report.max_length} tokens: {report.too_long} examples")
    if report.unread:
        out.append(f"  columns that nothing reads: {', '.join(report.unread)}")
    if report.example:
        out += [
            f"  line {report.example['line']} becomes",
            f"    prompt {report.example['prompt']!r:.600}",
            f"    target {report.example['target']!r:.600}",
        ]
    return out
