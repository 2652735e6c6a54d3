"""`ResultFile`, the output of a command that makes one result for each row; an interrupted run keeps what it has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer

from prefixfast.cli.output import printable
from prefixfast.errors import ConfigError, shown
from prefixfast.io.atomic import replace_file
from prefixfast.io.json_lines import json_line

if TYPE_CHECKING:
    from prefixfast.data.rows import Row
    from prefixfast.engine.request import Generation
    from prefixfast.engine.score import Score

PARTIAL = ".partial"  # ending of the file with the results so far


class ResultFile:
    """Context manager of a file of JSON lines.

    Results are added to ``PATH.partial`` as they come, and the whole file replaces ``PATH`` at the end. The partial
    file is made before any work, which finds out that the folder can be written.

    Args:
        path: File of the results. An earlier file is replaced at the end.

    Raises:
        ConfigError: If the path is a folder, or an interrupted run left results in the partial file.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial, self.count = path, path.with_name(path.name + PARTIAL), 0
        if path.is_dir():
            msg = f"--output: expected a file, got the folder {shown(str(path))}"
            raise ConfigError(msg)
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
        self._file.write(json_line(dataclasses.asdict(result)))
        self._file.flush()
        self.count += 1

    def finish(self, results: Iterable[Generation | Score]) -> None:
        """Write the file and remove the partial file.

        Args:
            results: All results in the order of the rows.
        """
        replace_file(self.path, b"".join(json_line(dataclasses.asdict(r)) for r in results))
        self._close()

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
