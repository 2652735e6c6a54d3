"""Rows, which are mappings, from files and iterables. A `Task` gives the meaning of the keys of a row."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from prefixfast.config.json_types import JSON
from prefixfast.data.files import FileRow, check_encoding, file_items
from prefixfast.data.folder import folder_hint
from prefixfast.errors import ConfigError, DataError, printable, shown
from prefixfast.io.paths import as_path
from prefixfast.io.progress import Progress

Row: TypeAlias = Mapping[str, JSON]
Rows: TypeAlias = str | Path | Iterable[Row]

# Calls by method that give the rows of a table of polars, pyarrow and pandas.
TABLE_CALLS = {"to_dicts": "to_dicts()", "to_pylist": "to_pylist()", "to_dict": "to_dict('records')"}


def read_rows(rows: Rows, encoding: str | None = None) -> list[Row]:
    """Read all rows of a file or an iterable.

    Args:
        rows: Path of a ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` (needs pyarrow) file,
            also with ``.gz``; or an iterable of mappings, such as a ``datasets.Dataset``.
        encoding: Encoding of a text file, for example ``"cp1252"``. None takes the encoding of the file's byte order
            mark, or UTF-8 without one.

    Returns:
        At least one row. Rows of a file keep its path and their line, which later errors of the row name.

    Raises:
        ConfigError: If the encoding is unknown.
        DataError: If the file cannot be read, a row is malformed (with path and line), or there are no rows.

    Example:
        >>> read_rows([{"prompt": "2+2=", "completion": "4"}])
        [{'prompt': '2+2=', 'completion': '4'}]
    """
    check_encoding(encoding)
    found: list[Any] = []  # items of an iterable can be anything
    if isinstance(rows, str | os.PathLike):
        path = _data_path(rows)
        if hint := folder_hint(path):
            raise DataError(hint, path=str(path))
        with Progress(f"read {path}"):
            for item in file_items(path, encoding, has_option=True):
                if isinstance(item, DataError):
                    raise item
                found.append(item)
    elif isinstance(rows, Mapping) or not _is_iterable(rows):
        msg = f"rows: expected a path or an iterable of mappings, got {shown(rows)}"
        raise DataError(msg)
    else:
        found = list(rows)
        for i, row in enumerate(found):
            if not isinstance(row, Mapping):
                msg = f"row {i}: expected a mapping, got {shown(row)}{_table_hint(rows)}"
                raise DataError(msg, line=i + 1)
    if not found:
        path_or_none = str(rows) if isinstance(rows, str | os.PathLike) else None
        where = "" if path_or_none is None else f"{printable(path_or_none)}: "
        msg = f"{where}expected at least one row, got none"
        raise DataError(msg, path=path_or_none)
    return found


def _data_path(path: str | os.PathLike[str]) -> Path:
    try:
        return as_path("rows", path)
    except ConfigError as e:
        raise DataError(str(e)) from e


def _table_hint(rows: object) -> str:
    """Advice for a table of a library, which does not give its rows as mappings."""
    call = next((call for name, call in TABLE_CALLS.items() if hasattr(rows, name)), None)
    return "" if call is None else f"; give {type(rows).__name__}.{call}, which are the rows of the table"


def _is_iterable(value: object) -> bool:
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True


def is_table_row(row: Row) -> bool:
    """Whether a row comes from a file of a table, whose first line names the columns."""
    return isinstance(row, FileRow) and any(s in row.path.lower() for s in (".csv", ".tsv"))


def row_error(row: Row, number: int, message: str) -> DataError:
    """Make the error of a malformed row.

    Args:
        row: Row. A row of a file is named by path and line, any other row by its number.
        number: Number of the row in its list, counted from 0.
        message: Description of the fault.
    """
    if isinstance(row, FileRow):
        return DataError(f"{row.path}:{row.line}: {message}", path=row.path, line=row.line)
    return DataError(f"row {number}: {message}", line=number + 1)
