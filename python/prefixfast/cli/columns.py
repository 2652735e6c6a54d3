"""Flags that map a user's own columns to prompt and target, for ``train`` and ``data check``."""

from __future__ import annotations

import csv
import re
from typing import TypedDict

import typer

from prefixfast.data.builtin_tasks import TASKS
from prefixfast.errors import ConfigError, shown

*NAMES, LAST_NAME = TASKS
TASK = typer.Option(
    help=f"Task that turns rows into text: {', '.join(NAMES)} or {LAST_NAME}.",
    show_default="the task that fits the rows' keys",
)
SPLIT = typer.Option(
    help="Split that a task's official file or folder holds: train, dev or test.",
    show_default="files of rows",
)
PROMPT = typer.Option(
    help=r"Prompt of each row, with columns in braces: '{name}, {price} ->'. \n is a line break, {{ a brace. Needs "
    "--target, and takes the place of --task.",
    show_default="the task's prompt",
)
TARGET = typer.Option(
    help="Column of the text to learn, or a template of columns in braces.", show_default="the task's target"
)
TABLE = typer.Option(
    help="Columns with commas between them, as in name,price,colour, that are written as a table in the place of "
    "--prompt. Empty values are left out.",
    show_default="no table",
)
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


class ColumnArguments(TypedDict):
    """Arguments of `prefixfast.train` that map columns."""

    prompt: str | None
    target: str | None
    table: list[str] | None


def column_arguments(prompt: str | None, target: str | None, table: str | None) -> ColumnArguments:
    """Arguments of `prefixfast.train` from the values of the flags.

    Args:
        prompt: Value of ``--prompt``.
        target: Value of ``--target``.
        table: Value of ``--table``.

    Raises:
        ConfigError: If the names of the table cannot be split.
    """
    return {"prompt": _unescaped(prompt), "target": _unescaped(target), "table": _names(table)}


def _unescaped(template: str | None) -> str | None:
    r"""A template with the characters that a shell cannot write: ``\n``, ``\t`` and ``\\``."""
    return None if template is None else re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], template)


def _names(table: str | None) -> list[str] | None:
    """Names of columns; a name with a comma stands in double quotes."""
    if table is None:
        return None
    try:
        (names,) = csv.reader([table], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as e:
        msg = f"--table: expected names of columns with commas between them, got {shown(table)}"
        raise ConfigError(msg) from e
    return [name.strip() for name in names]
