"""Outputs of a command that makes one result for each row: a file, or standard output.

An interrupted run keeps what it has: results are added to ``PATH.partial`` as they come.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer

from prefixfast.cli.output import printable
from prefixfast.cli.records import Records
from prefixfast.cli.result_formats import FORMULA_STARTS, LINE_BREAK, file_content, format_of, left_out, record_line
from prefixfast.errors import ConfigError, shown
from prefixfast.io.atomic import replace_file
from prefixfast.io.paths import check_not_input

if TYPE_CHECKING:
    from prefixfast.data.rows import Row
    from prefixfast.engine.request import Generation
    from prefixfast.engine.score import Score

PARTIAL = ".partial"  # ending of the file with the results so far
STDOUT = Path("-")

logger = logging.getLogger(__name__)


def open_results(path: Path, makes: Records, details: Records) -> ResultFile | StandardOutput:
    """The place of the results of a run.

    Args:
        path: Path of a file, or ``-`` for standard output.
        makes: Maker of the records of the output.
        details: Maker of the records of the partial file, with all fields.

    Raises:
        ConfigError: If the path is a folder, or an interrupted run left results in the partial file.
        OSError: If the file cannot be written.
    """
    if makes.renamed:
        pairs = ", ".join(f"{shown(old)} as {shown(new)}" for old, new in makes.renamed.items())
        logger.info("columns with the name of a field of the results are written under another name: %s", pairs)
    return StandardOutput(makes) if path == STDOUT else ResultFile(path, makes, details)


def print_counts(path: Path, counts: str) -> None:
    """Print the last line of a command, on standard error if the results are on standard output.

    Args:
        path: Path of the results, or ``-`` for standard output.
        counts: Numbers of the results.
    """
    is_stdout = path == STDOUT
    typer.echo(f"{'standard output' if is_stdout else printable(str(path))}: {counts}", err=is_stdout)


def check_path(path: Path, requests: Path | None = None) -> None:
    """Check the suffix of an output, and that it is no folder and not the input.

    Args:
        path: Path of the output, or ``-`` for standard output.
        requests: Path of the input, None if it was checked before.

    Raises:
        ConfigError: If the suffix is unknown, or the path is a folder or the input.
    """
    if path.is_dir():
        msg = f"--output: expected a file, got the folder {shown(str(path))}"
        raise ConfigError(msg)
    if path != STDOUT:
        format_of(path)
        check_not_input("--output", [path], [] if requests is None else [requests])


class ResultFile:
    """Context manager of an output file.

    Results are added to ``PATH.partial`` as JSON lines as they come, and the whole file replaces ``PATH`` at the end.
    The partial file is made before any work, which finds out that the folder can be written.

    Args:
        path: File of the results. An earlier file is replaced at the end.
        makes: Maker of the records.
        details: Maker of the records of the partial file.
    """

    def __init__(self, path: Path, makes: Records, details: Records) -> None:
        check_path(path)
        self.path, self.partial, self.count = path, path.with_name(path.name + PARTIAL), 0
        self.makes, self.details = makes, details
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.is_file() and self.partial.stat().st_size == 0:
            self.partial.unlink()
        try:
            self._file = self.partial.open("xb")
        except FileExistsError as e:
            msg = (
                f"--output: {shown(str(self.partial))} holds results of a run that was interrupted or is running; "
                "move it away to keep them, or remove it"
            )
            raise ConfigError(msg) from e

    def add(self, result: Generation | Score) -> None:
        """Add a result to the partial file, which a killed process leaves behind."""
        self._file.write(record_line(self.details.record(result)))
        self._file.flush()
        self.count += 1

    def finish(self, results: Iterable[Generation | Score]) -> None:
        """Write the file and remove the partial file.

        Args:
            results: All results in the order of the rows.
        """
        records = [self.makes.record(r) for r in results]
        replace_file(self.path, file_content(self.path, self.makes, records))
        self._close()
        if lost := left_out(self.path, self.makes, records):
            logger.info("%s holds the %s alone, without %s", self.path, self.makes.fields.main, ", ".join(lost))
        if format_of(self.path) == ".csv":
            _note_formulas(self.makes, records)
        if format_of(self.path) == ".txt":
            _note_line_breaks(self.makes, records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file.closed:
            return
        if self.count:
            self._file.close()
            typer.echo(f"{self.count} results are in {printable(str(self.partial))}", err=True)
        else:
            self._close()

    def _close(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)


class StandardOutput:
    """Context manager of results on standard output, one JSON line for each row in the order of the rows.

    Args:
        makes: Maker of the records.
    """

    def __init__(self, makes: Records) -> None:
        self.makes, self.next = makes, 0
        self.waiting: dict[int, Generation | Score] = {}

    def add(self, result: Generation | Score) -> None:
        """Write a result as soon as those of all rows before it are written."""
        self.waiting[result.index] = result
        while (following := self.waiting.pop(self.next, None)) is not None:
            self._write(following)

    def finish(self, results: Iterable[Generation | Score]) -> None:
        """Write the results that are not written yet.

        Args:
            results: All results in the order of the rows.
        """
        for result in list(results)[self.next :]:
            self._write(result)

    def _write(self, result: Generation | Score) -> None:
        sys.stdout.buffer.write(record_line(self.makes.record(result)))
        sys.stdout.buffer.flush()
        self.next += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


def _note_formulas(makes: Records, records: Sequence[Mapping[str, Any]]) -> None:
    """Log how many texts of a table a spreadsheet would take for formulas; they are written as they are."""
    if count := sum(t.startswith(FORMULA_STARTS) for t in _texts(makes, records)):
        begins = ", ".join(FORMULA_STARTS)
        logger.info("%d texts begin with one of %s: import the column as text into a spreadsheet", count, begins)


def _note_line_breaks(makes: Records, records: Sequence[Mapping[str, Any]]) -> None:
    """Log how many texts of a file of plain text have line breaks, which are spaces there."""
    if count := sum(LINE_BREAK.search(t) is not None for t in _texts(makes, records)):
        logger.info("%d texts have line breaks, which are written as spaces: .jsonl and .csv keep them", count)


def _texts(makes: Records, records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = (text for r in records for text in r.get("texts", [r.get(makes.fields.main)]))
    return [text for text in found if isinstance(text, str)]


def check_ids(rows: Sequence[Row]) -> None:
    """Check that the results can repeat the id of each row, before any work.

    Raises:
        DataError: If JSON cannot hold an id, with the place of its row.
    """
    from prefixfast.data.rows import row_error

    for i, row in enumerate(rows):
        try:
            json.dumps(row.get("id"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            got = type(row["id"]).__name__
            raise row_error(row, i, f"id: expected a value that JSON can hold, got {got}: {e}") from e
