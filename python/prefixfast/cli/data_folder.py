"""Check of every file of a folder before training, one prefix for each file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from prefixfast.cli.output import printable, show
from prefixfast.data.folder import Folder
from prefixfast.io.text import counted

if TYPE_CHECKING:
    from prefixfast.data.check_data import DataReport, Problem

COLUMNS = ("name", "task", "rows", "examples", "problems")


def check_folder(folder: Folder, check: Callable[[Path], DataReport], *, as_json: bool) -> None:
    """Print one line for each file, then the totals, problems and warnings to standard error.

    Args:
        folder: Files of rows by name.
        check: Function that checks one file.
        as_json: Whether to print JSON.

    Raises:
        Exit: With the status 1 if there are problems.
    """
    reports = {name: check(file) for name, file in folder.items()}
    totals = {key: sum(getattr(r, key) for r in reports.values()) for key in ("rows", "examples", "num_problems")}
    if as_json:
        files = {name: dataclasses.asdict(report) for name, report in reports.items()}
        typer.echo(json.dumps({"files": files, "left_out": folder.skipped, **totals}, ensure_ascii=False))
    else:
        lines = [
            dict(zip(COLUMNS, (name, r.task, r.rows, r.examples, r.num_problems), strict=True))
            for name, r in reports.items()
        ]
        show(lines, COLUMNS, as_json=False)
        wrong = sum(r.num_problems > 0 for r in reports.values())
        counts = f"{counted(len(reports), 'file')}, {all_counts(*totals.values())} in {counted(wrong, 'file')}"
        typer.echo(f"{printable(str(folder.path))}: {counts}", err=True)
        for report in reports.values():
            warnings = [f"{printable(report.path)}: warning: {warning}" for warning in report.warnings]
            for line in problem_lines(report) + warnings:
                typer.echo(line, err=True)
    if totals["num_problems"]:
        raise typer.Exit(1)


def all_counts(rows: int, examples: int, problems: int) -> str:
    """Numbers of rows, examples and problems as text."""
    return f"{counted(rows, 'row')}, {counted(examples, 'example')}, {counted(problems, 'problem')}"


def problem_lines(report: DataReport) -> list[str]:
    """Problems of a file, each as a line of text with its place."""
    found = [_placed(report.path, problem) for problem in report.problems]
    more = report.num_problems - len(report.problems)
    return [*found, f"... and {more} more"] if more > 0 else found


def _placed(path: str, problem: Problem) -> str:
    line, message = problem["line"], problem["message"]
    if line is None:
        return message if path in message else f"{path}: {message}"
    return message if f":{line}: " in message else f"{path}:{line}: {message}"
