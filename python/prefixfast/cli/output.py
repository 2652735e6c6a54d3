"""Output of commands: a table on a terminal, tab-separated lines in a pipe, or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unicodedata import category

import typer

QUIET = typer.Option("--quiet", "-q", help="Print errors, and on standard output only what was asked for.")
LONGEST = 80  # characters of a cell on a terminal
SOME_FAILED = 3  # exit status


def start_logging(*, quiet: bool = False) -> None:
    """Write log lines and warnings of the process to standard error, or none if ``quiet``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if quiet:
        logging.disable(logging.WARNING)
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when transformers is imported
        warnings.simplefilter("ignore")


def show(
    rows: Sequence[Mapping[str, Any]], columns: Iterable[str], *, as_json: bool, title: str = "", longest: int = LONGEST
) -> None:
    """Print rows.

    Args:
        rows: Values by column; JSON holds all of them.
        columns: Columns of the table and of the tab-separated lines.
        as_json: Whether to print JSON.
        title: Title of the table.
        longest: Number of characters after which a cell of the table is cut.
    """
    columns = list(columns)
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    cells = [[printable(row[column]) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        for line in ([printable(c) for c in columns], *cells):
            typer.echo("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=Text(title) if title else None)
    for line in cells:
        table.add_row(*(Text(cell if len(cell) <= longest else cell[: longest - 1] + "…") for cell in line))
    Console().print(table)


def show_one(values: Mapping[str, Any], *, as_json: bool, title: str = "") -> None:
    """Print the properties of one thing, one on each line.

    Args:
        values: Values by property.
        as_json: Whether to print JSON.
        title: Title of the table.
    """
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    elif not sys.stdout.isatty():
        for name, value in values.items():
            typer.echo(f"{name}\t{printable(value)}")
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None, show_header=False)
        for name, value in values.items():
            table.add_row(Text(name), Text(printable(value)))
        Console().print(table)


def printable(value: Any) -> str:
    """One line of text without control characters, since names can come from untrusted files."""
    if value is None:
        return "-"
    text = json.dumps(value) if isinstance(value, (dict, list, tuple, bool)) else str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def printable_text(text: str) -> str:
    """Text of several lines with an escape in place of each other control character, for a terminal."""
    return "".join(
        c if c in "\n\t" or category(c) != "Cc" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def in_bytes(count: int) -> str:
    """Size with a unit, such as ``3.8 KiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
