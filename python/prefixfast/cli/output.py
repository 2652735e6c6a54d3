"""What commands print: a table on a terminal, tab-separated lines in a pipe, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST = 80  # characters of a cell on a terminal


def show(rows: Sequence[Mapping[str, Any]], columns: Iterable[str], *, as_json: bool, title: str = "") -> None:
    """Print rows; JSON holds all of a row's keys, the other two the columns."""
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    cells = [[printable(row[column]) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        for line in ([printable(c) for c in columns], *cells):
            typer.echo("\t".join(line))
        return
    table = Table(*columns, title=title or None)
    for line in cells:
        table.add_row(*(Text(cell if len(cell) <= LONGEST else cell[: LONGEST - 1] + "…") for cell in line))
    Console().print(table)


def show_one(values: Mapping[str, Any], *, as_json: bool, title: str = "") -> None:
    """Print one thing's properties, one a line."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    elif not sys.stdout.isatty():
        for name, value in values.items():
            typer.echo(f"{name}\t{printable(value)}")
    else:
        table = Table(title=title or None, show_header=False)
        for name, value in values.items():
            table.add_row(name, Text(printable(value)))
        Console().print(table)


def printable(value: Any) -> str:
    """One line of text that cannot steer a terminal: names come from strangers."""
    if value is None:
        return "-"
    text = (
        value
        if isinstance(value, str)
        else json.dumps(value)
        if isinstance(value, (dict, list, tuple, bool))
        else str(value)
    )
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def in_bytes(count: int) -> str:
    """Bytes for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
