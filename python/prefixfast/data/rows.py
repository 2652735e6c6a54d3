"""Rows from files and iterables. A row is a mapping; what its keys mean is up to the task (`prefixfast.data.tasks`)."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixfast.errors import DataError

Row = Mapping[str, Any]
Rows = str | Path | Iterable[Row]


def read_rows(rows: Rows) -> list[Row]:
    """All rows.

    Args:
        rows: A ``.jsonl``, ``.json`` or ``.csv`` file, also with ``.gz``, or an iterable of mappings (a datasets.Dataset is one).

    Raises:
        DataError: For an unreadable file or a malformed row, with path and line.
    """
    if isinstance(rows, str | Path):
        found: list[Any] = _read_file(Path(rows))
        where: str | None = str(rows)
    else:
        found, where = list(rows), None
    for i, row in enumerate(found):
        if not isinstance(row, Mapping):
            msg = f"row {i}: expected a mapping, got {type(row).__name__}"
            raise DataError(msg, path=where, line=i + 1)
    if not found:
        msg = "expected at least one row, got none"
        raise DataError(msg, path=where)
    return found


def _read_file(path: Path) -> list[Any]:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in _READERS:
        msg = f"{path}: expected a file ending in {', '.join(_READERS)} (also with .gz)"
        raise DataError(msg, path=str(path))
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        msg = f"{path}: cannot be read: {e}"
        raise DataError(msg, path=str(path)) from e
    return _READERS[kind](text, path)


def _jsonl(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_object(json.loads(line), path, number))
            except (ValueError, RecursionError) as e:
                if isinstance(e, DataError):
                    raise
                msg = f"{path}:{number}: expected one JSON object a line, got {line[:80]!r}: {e}"
                raise DataError(msg, path=str(path), line=number) from e
    return rows


def _json(text: str, path: Path) -> list[Row]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        msg = f"{path}: expected JSON: {e}"
        raise DataError(msg, path=str(path)) from e
    if not isinstance(value, list):
        msg = f"{path}: expected a JSON list of objects, got {type(value).__name__}"
        raise DataError(msg, path=str(path))
    return value


def _csv(text: str, path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    for row in _until_error(reader, path):
        if None in row or None in row.values():
            msg = f"{path}:{reader.line_num}: expected {len(reader.fieldnames or ())} columns as in the header"
            raise DataError(msg, path=str(path), line=reader.line_num)
        rows.append(row)
    return rows


def _until_error(reader: Any, path: Path) -> Iterator[Any]:
    try:
        yield from reader
    except csv.Error as e:
        msg = f"{path}:{reader.line_num}: malformed CSV: {e}"
        raise DataError(msg, path=str(path), line=reader.line_num) from e


def _object(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        msg = f"{path}:{number}: expected a mapping, got {type(value).__name__}"
        raise DataError(msg, path=str(path), line=number)
    return value


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
