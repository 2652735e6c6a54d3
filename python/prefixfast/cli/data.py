"""Command ``prefixfast data check PATH``."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.columns import PROMPT, SPLIT, TABLE, TARGET, TASK, column_arguments
from prefixfast.cli.data_folder import all_counts, check_folder, problem_lines
from prefixfast.cli.generate import ENCODING, FORMATS
from prefixfast.cli.help import Command, Group
from prefixfast.cli.output import printable
from prefixfast.cli.prefixes import Json
from prefixfast.cli.row_files import folder_at
from prefixfast.errors import ConfigError, shown

if TYPE_CHECKING:
    from prefixfast.data.check_data import DataReport

EXAMPLE = """prefixfast data check rows.jsonl --model gpt2
prefixfast data check a.csv --prompt '{name}, {price} ->' --target text"""
SHOWN = 240  # characters of a prompt or a target
PATH = typer.Argument(
    metavar="PATH",
    help=f"File of rows ({FORMATS}), or a folder or glob pattern of such files. TASK PATH names a task too.",
)
app = typer.Typer(cls=Group, help="Check data before training on it.", epilog=EXAMPLE, no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Check data before training on it."""


@app.command("check", cls=Command, epilog=EXAMPLE)
def check_rows(
    path: Annotated[str, PATH],
    second: Annotated[str | None, typer.Argument(hidden=True)] = None,
    task: Annotated[str | None, TASK] = None,
    prompt: Annotated[str | None, PROMPT] = None,
    target: Annotated[str | None, TARGET] = None,
    table: Annotated[str | None, TABLE] = None,
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
            help="Number of tokens above which an example, or the source of an encoder-decoder base, counts as too "
            "long. Needs --model. In training the prefix takes positions too, so that an example that fits here can "
            "be too long there.",
            show_default="all positions of the model",
        ),
    ] = None,
    max_errors: Annotated[int, typer.Option(min=0, help="Number of problems to list; all are counted.")] = 100,
    split: Annotated[str | None, SPLIT] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    as_json: Json = False,
) -> None:
    """List every problem of a file of rows with its line, the rows' lengths, and three rows as the model reads them.

    A folder of row files gets a line for each of its files instead, with the numbers of rows, examples and problems.

    The exit status is 1 if there are problems.
    """
    from prefixfast.data.check_data import BaseVocabulary, check_data
    from prefixfast.data.columns import task_of_columns

    if max_length is not None and model is None:
        msg = "--max-length: expected together with --model, whose tokens it counts"
        raise ConfigError(msg)
    base = _tokenizer_and_sizes(model) if model is not None else {}
    if max_length is not None:
        base["max_length"] = max_length
    name, path = (task, path) if second is None else _first_is_task(path, second, task)
    own = task_of_columns(None if name == "auto" else name, **column_arguments(prompt, target, table))
    vocabulary = BaseVocabulary(**base)
    check = functools.partial(check_data, own, split=split, base=vocabulary, max_errors=max_errors, encoding=encoding)
    if (folder := folder_at(path, official=split is not None)) is not None:
        check_folder(folder, check, as_json=as_json)
        return
    report = check(path)
    typer.echo(json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else "\n".join(_lines(report)))
    if report.num_problems:
        raise typer.Exit(1)


def _first_is_task(first: str, second: str, task: str | None) -> tuple[str, str]:
    """The task and the path of ``TASK PATH``.

    Raises:
        ConfigError: If there is a second task, or the two are in the wrong order.
    """
    from prefixfast.data import TASKS

    if task is not None:
        msg = f"--task: expected none beside TASK PATH, got {shown(task)} beside {shown(first)} {shown(second)}"
        raise ConfigError(msg)
    if first not in TASKS and second in ("auto", *TASKS):
        msg = f"PATH: expected TASK PATH, got {first} {second}; write --task {second}, or the task first"
        raise ConfigError(msg)
    return first, second


def _tokenizer_and_sizes(model: str) -> dict[str, Any]:
    """Tokenizer, vocabulary size and positions of a base, without its weights."""
    from transformers import AutoConfig

    from prefixfast.model.seq2seq.facts import config_facts
    from prefixfast.model.tokenizer import Tokenizer, read_tokenizer

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as e:
        msg = f"model: the config of {shown(model)} cannot be loaded: {e}"
        raise ConfigError(msg) from e
    decoder = config_facts(config) if config.is_encoder_decoder else None
    config = config.get_text_config()
    positions = config.max_position_embeddings if decoder is None else decoder.encoder_positions
    return {
        "tokenizer": Tokenizer.from_hf(read_tokenizer(model)),
        "vocab_size": int(config.vocab_size),
        "max_length": None if decoder is not None and decoder.has_distances else int(positions),
        "decoder": decoder,
    }


def _lines(report: DataReport) -> list[str]:
    """Report as lines of text."""
    out = problem_lines(report)
    counts = all_counts(report.rows, report.examples, report.num_problems)
    out.append(f"{report.path}: task {report.task}, {counts}")
    for unit, of in (("characters", report.characters), ("tokens", report.tokens)):
        for name, at in of.items():
            out.append(f"  {unit} of the {name}: " + ", ".join(f"{v} at {p} %" for p, v in at.items()))
    if report.tokens and report.max_length:
        what = "examples" if "example" in report.tokens else "sources"
        out.append(f"  over {report.max_length} tokens: {report.too_long} {what}")
    if report.unread:
        out.append(f"  unused columns: {', '.join(report.unread)}")
    out += [f"  note: {note}" for note in report.notes]
    out += [f"  warning: {warning}" for warning in report.warnings]
    end = "" if report.tokens else "; the end token of the model follows the target"
    out += [f"  rows as the model reads them, prompt + target{end}:"] if report.shown else []
    for row in report.shown:
        place = f"{row['which']} length" if row["which"] == "median" else row["which"]
        file = "" if row["path"] == report.path else f" of {printable(str(row['path']))}"  # a file of a folder
        out += [f"  {place}, line {row['line']}{file}", f"    {_text(row['prompt'])} + {_text(row['target'])}"]
    return out


def _text(text: str) -> str:
    """A text in quotes; of a long one the start and the end."""
    middle = "" if len(text) <= SHOWN else " ... "
    return repr(text[: SHOWN // 2] + middle + text[-SHOWN // 2 :]) if middle else repr(text)
