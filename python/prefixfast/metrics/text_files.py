"""Text files and rows, as the readers of outputs and of references take both."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixfast.data.files import SUFFIXES, FileRow, Item, file_kind, read_text
from prefixfast.data.files.kinds import ADVICE_BY_SUFFIX, CORPUS_BY_SUFFIX, JSON_TABLE, PLAIN_TEXT
from prefixfast.data.rows import Row
from prefixfast.errors import ConfigError, DataError, named_errors, shown

ROW_SUFFIXES = (*SUFFIXES, ".xml")
START = 1000  # characters of a text file in which a row shows its keys


def listed_values(name: str, values: Any) -> list[Any]:
    """Values of an iterable that is no mapping.

    Args:
        name: Name of the argument, for the error.
        values: Argument of `evaluate` that is no path.

    Raises:
        ConfigError: If it is something else.
    """
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        msg = f"{name}: expected a path, or a list of texts or rows, got {shown(values)}"
        raise ConfigError(msg)
    return list(values)


def is_text_file(path: Path) -> bool:
    """Whether a file holds lines of text. A reader of rows reads any other, or refuses it with advice."""
    kind = file_kind(path)
    is_known = kind in ROW_SUFFIXES or ADVICE_BY_SUFFIX.get(kind, PLAIN_TEXT) != PLAIN_TEXT
    return not path.is_dir() and (kind in CORPUS_BY_SUFFIX or not is_known) and kind not in ROW_SUFFIXES


def text_file_lines(path: Path, keys: Sequence[str]) -> list[str]:
    r"""Lines of a text file. ``\n`` and ``\r\n`` end a line, and no other character, as in JSON lines.

    Args:
        path: Path of the file.
        keys: Keys of texts, of which a row would have one.

    Raises:
        DataError: If the file cannot be read, or holds rows in JSON.
    """
    text = read_text(path)
    if JSON_TABLE.match(text[:START].encode()) and re.search(rf'"({"|".join(keys)})"\s*:', text[:START]):
        msg = f"{path}: expected one text a line, got rows in JSON; name the file .json or .jsonl"
        raise DataError(msg, path=str(path))
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def item_rows(items: Iterable[Item]) -> list[Row]:
    """Rows of a file; the first malformed one is raised."""
    rows: list[Row] = []
    for item in items:
        if isinstance(item, DataError):
            raise item
        rows.append(item)
    return rows


def row_errors(name: str, row: Row) -> contextlib.AbstractContextManager[None]:
    """Context manager that puts the name of the argument before the error of a row that is in no file.

    Args:
        name: Name of the argument.
        row: Row, empty for a text.
    """
    return contextlib.nullcontext() if isinstance(row, FileRow) else named_errors(f"{name}: ", DataError)


def row_place(row: Row, name: str, number: int) -> str:
    """Place of a row for errors: its file and line, or the argument and its number.

    Args:
        row: Row.
        name: Name of the argument.
        number: Number of the row, from 0.
    """
    return f"{row.path}:{row.line}" if hasattr(row, "path") and hasattr(row, "line") else f"{name}: row {number}"
