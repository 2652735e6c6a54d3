"""Command ``prefixfast try MODEL TEXT``, which shows the answers of a base alone and with several prefixes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.generate import ENCODING, FORMATS
from prefixfast.cli.options import flags
from prefixfast.cli.output import printable, printable_text, show
from prefixfast.cli.prefix_choice import NAMES_OF_STORE, NamedStore, PrefixChoice
from prefixfast.cli.prefixes import Json
from prefixfast.cli.read_prefix import loaded_base
from prefixfast.cli.requests import known_rows
from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.data.files import SUFFIXES
from prefixfast.data.formats import TARGET_KEYS
from prefixfast.errors import DataError, shown

if TYPE_CHECKING:
    from prefixfast.cli.text_reader import TextReader
    from prefixfast.data.rows import Row
    from prefixfast.data.task import Task
    from prefixfast.engine.engine import Engine
    from prefixfast.engine.request import Generation

BASE_ALONE = "the base alone"
MOST_ROWS = 20  # rows of a file; more are a run of prefixfast generate
FILE = re.compile(rf".+({'|'.join(map(re.escape, SUFFIXES))})(\.gz)?")
NARROWEST = 24  # characters of a column of the table
EXAMPLE = 'prefixfast try gpt2 "Where is the inn?" --prefix mill --prefix inn'


@dataclass(frozen=True)
class Answer:
    """Answer to one text.

    Attributes:
        text: Text or row that was answered.
        prefix: Name of the prefix, None for the base alone.
        result: Result of the request.
    """

    text: str
    prefix: str | None
    result: Generation

    def record(self) -> dict[str, Any]:
        """Values for JSON."""
        r = self.result
        return {
            "input": self.text,
            "prefix": self.prefix,
            "text": r.text,
            "texts": r.texts,
            "finish_reason": r.finish_reason,
            "usage": r.usage,
        }


@flags(GenerationParams, EngineConfig)
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of the base.")],
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="Text to answer; a row as JSON for prefixes that read tables. The path of a file of at most "
            f"{MOST_ROWS} rows ({FORMATS}) answers its rows.",
        ),
    ],
    prefix: Annotated[
        list[str] | None,
        typer.Option(help=f"Folder or hub id of a prefix to compare. {NAMES_OF_STORE}", show_default="no prefix"),
    ] = None,
    store: NamedStore = None,
    encoding: Annotated[str | None, ENCODING] = None,
    as_json: Json = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Answer a text with the base alone and with each prefix, in one batch, and show the answers side by side.

    Each prefix reads the text as it was trained to. The base alone reads it as the first prefix does. On a terminal
    the answers are columns, or stand below each other where the columns would be narrow. In a pipe they are lines
    with tabs between the text, the prefix and the answer.
    """
    own = {name: value for name, value in fields.items() if name in GenerationParams.names()}
    params = GenerationParams.make(**own)
    config = EngineConfig.make(**{name: value for name, value in fields.items() if name not in own})
    rows = _read_small(text, encoding) if _is_file(text) else None
    choice = PrefixChoice(prefix or [], store)
    if rows is not None:
        headers = choice.headers()[:1]
        rows = known_rows(rows, [headers] * len(rows) if headers else None, None)

    from prefixfast.engine.engine import Engine

    with loaded_base(model, fields) as loaded, Engine(loaded, config=config) as engine:
        choice.model = engine.model
        answers = _answers(engine, choice, text if rows is None else rows, prefix or [], params)
    if as_json or not sys.stdout.isatty():
        show([answer.record() for answer in answers], ("input", "prefix", "text"), as_json=as_json)
    else:
        _show(answers, 1 + len(prefix or []))


def _is_file(text: str) -> bool:
    """Whether a text is the path of a file of rows: it ends like one, and has no space or exists."""
    return FILE.fullmatch(text) is not None and (not re.search(r"\s", text) or Path(text).is_file())


def _read_small(path: str, encoding: str | None) -> list[Row]:
    """Rows of a small file.

    Raises:
        DataError: If the file cannot be read, or has many rows.
    """
    from prefixfast.data import read_rows

    rows = read_rows(path, encoding)
    if len(rows) > MOST_ROWS:
        msg = f"{shown(path)}: expected at most {MOST_ROWS} rows, got {len(rows)}; prefixfast generate answers more"
        raise DataError(msg, path=path)
    return rows


def _answers(
    engine: Engine, choice: PrefixChoice, asked: str | Sequence[Row], names: Sequence[str], params: GenerationParams
) -> list[Answer]:
    """Answers to a text or to rows, each by the base alone and with each prefix, in one batch."""
    from prefixfast.cli.text_reader import TextReader

    reader, found = TextReader(engine.model, None), [choice.find(name) for name in names]
    texts = [asked] if isinstance(asked, str) else list(asked)
    readers = [found[:1], *([p] for p in found)]  # prefixes whose task reads the text for each answer
    batch = [_item(reader, text, reader.task(own)) for text in texts for own in readers]
    results = engine.generate(batch, [None, *found] * len(texts), params=params)
    asked_by = [(_shown_input(text), name) for text in texts for name in (None, *names)]
    return [Answer(text, name, result) for (text, name), result in zip(asked_by, results, strict=True)]


def _item(reader: TextReader, text: str | Row, task: Task) -> Row:
    """Request of a text or row, which keeps the parameters of a row."""
    if isinstance(text, str):
        return {"input_ids": reader.ids(text, task).tolist()}
    from prefixfast.engine.make_requests import request_value

    params = request_value(text, task, "params")
    own = {} if params is None else {"params": params}
    return {"input_ids": reader.row_ids(text, task).tolist(), **own}


def _shown_input(text: str | Row) -> str:
    """Text, or the values of a row that can be its input."""
    if isinstance(text, str):
        return text
    hidden = {"params", "prefix", "id", *TARGET_KEYS}
    values = [value for key, value in text.items() if key not in hidden and value is not None]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else json.dumps(values, ensure_ascii=False)


def _show(answers: Sequence[Answer], per_text: int) -> None:
    """Print answers to a terminal, side by side where the columns are wide enough."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    by_text = [answers[i : i + per_text] for i in range(0, len(answers), per_text)]
    several = len(by_text) > 1
    headings = [*(["input"] if several else []), *(_heading(answer) for answer in by_text[0])]
    size = shutil.get_terminal_size()
    console = Console(width=size.columns, height=size.lines)  # a terminal without escapes has a width too
    if console.width // len(headings) < NARROWEST:
        for own in by_text:
            if several:
                typer.echo(f"input: {printable(own[0].text)}")
            for answer in own:
                typer.echo(f"{_heading(answer)}:\n{indent(_all_texts(answer), '  ')}")
        return
    table = Table(*(Column(Text(heading)) for heading in headings), show_lines=several)
    for own in by_text:
        cells = [*([printable_text(own[0].text)] if several else []), *map(_all_texts, own)]
        table.add_row(*map(Text, cells))
    console.print(table)


def _heading(answer: Answer) -> str:
    return BASE_ALONE if answer.prefix is None else printable(answer.prefix)


def _all_texts(answer: Answer) -> str:
    """All texts of an answer, with an empty line between two."""
    return "\n\n".join(printable_text(text.strip("\n")) for text in answer.result.texts)
