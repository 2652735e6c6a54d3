"""Rows from files and iterables. A row is a mapping; what its keys mean is up to the task (`prefixfast.data.tasks`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefixfast.data.files import FileRow, items
from prefixfast.errors import DataError

Row = Mapping[str, Any]
Rows = str | Path | Iterable[Row]


def read_rows(rows: Rows) -> list[Row]:
    """All rows.

    Args:
        rows: A ``.jsonl``, ``.json`` (a list of objects), ``.csv`` (with a header) or ``.parquet`` (needs pyarrow) file, also with ``.gz``, or an iterable of
            mappings (a datasets.Dataset is one). Rows of a file know their line, so that whatever is found wrong with them later is named by it.

    Raises:
        DataError: For an unreadable file or a malformed row, with path and line.

    Example:
        >>> read_rows([{"prompt": "2+2=", "completion": "4"}])
        [{'prompt': '2+2=', 'completion': '4'}]
    """
    where = None
    found: list[Any] = []
    if isinstance(rows, str | Path):
        where = str(rows)
        for item in items(Path(rows)):
            if isinstance(item, DataError):
                raise item
            found.append(item)
    else:
        found = list(rows)
        for i, row in enumerate(found):
            if not isinstance(row, Mapping):
                msg = f"row {i}: expected a mapping, got {type(row).__name__}"
                raise DataError(msg, line=i + 1)
    if not found:
        msg = "expected at least one row, got none"
        raise DataError(msg, path=where)
    return found


def row_error(row: Row, number: int, what: str) -> DataError:
    """The error of a row: named by file and line if it is of a file, else by its number, counted from 0."""
    if isinstance(row, FileRow):
        return DataError(f"{row.path}:{row.line}: {what}", path=row.path, line=row.line)
    return DataError(f"row {number}: {what}", line=number + 1)
