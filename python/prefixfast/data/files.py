"""Files of rows, item by item: a row that knows its line, or in its place what is wrong with it."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixfast.errors import DataError

SPACE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"


class FileRow(dict[str, Any]):
    """A row of a file: a dictionary that knows where it stands.

    Attributes:
        path: The file.
        line: The line it begins on, counted from 1 (in a .parquet file its number).
    """

    __slots__ = ("line", "path")

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]], path: str, line: int) -> None:
        super().__init__(values)
        self.path, self.line = path, line

    def __reduce__(self) -> tuple[object, ...]:
        return FileRow, (dict(self), self.path, self.line)


Item = FileRow | DataError


def items(path: Path) -> Iterator[Item]:
    """Rows in order, and a `DataError` in place of each that is malformed; what hides all that follows it is the last.

    Raises:
        DataError: If the file cannot be read at all.
    """
    suffixes = [s for s in path.suffixes if s != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        msg = f"{path}: expected a file ending in {', '.join(READERS)} (also with .gz)"
        raise DataError(msg, path=str(path))
    yield from READERS[kind](read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked if its name ends in .gz."""
    try:
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).removeprefix(BOM)
    except (OSError, EOFError, zlib.error) as e:
        msg = f"{path}: cannot be read: {e}"
        raise DataError(msg, path=str(path)) from e


def objects(text: str, path: str, at: int, closing: str = "") -> Iterator[Item]:
    """The objects of the JSON list that begins at ``text[at]``, each with its line.

    Args:
        text: A whole file.
        path: For messages.
        at: Where the list begins.
        closing: What follows the list, white space apart.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    line, counted = 1, 0
    at = _skip(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            yield _malformed(path, getattr(e, "lineno", text.count("\n", 0, at) + 1), f"expected JSON: {e}")
            return
        line, counted = line + text.count("\n", counted, at), at
        yield _row(value, path, line)
        at = _skip(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _skip(text, at + 1)
    if text[at : at + 1] != "]" or text[at + 1 :].strip(" \t\r\n") != closing:
        expected = f"']{closing}' at its end, or ',' between two objects"
        yield _malformed(
            path, text.count("\n", 0, at) + 1, f"expected {expected}, got {text[at : at + 20]!r}; is the file cut?"
        )


def _json(raw: bytes, path: str) -> Iterator[Item]:
    text = decode(raw, path)
    at = _skip(text, 0)
    if text[at : at + 1] == "[":
        yield from objects(text, path, at)
    else:
        yield _no_list(text, path)


def decode(raw: bytes, path: str) -> str:
    """UTF-8 text of a whole file."""
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise _malformed(path, raw.count(b"\n", 0, e.start) + 1, f"cannot be read: expected UTF-8: {e}") from e


def _jsonl(raw: bytes, path: str) -> Iterator[Item]:
    for number, line in enumerate(io.BytesIO(raw), 1):
        if line.strip():
            try:
                yield _row(json.loads(line.decode(), object_pairs_hook=_unique), path, number)
            except (ValueError, RecursionError) as e:
                yield _malformed(
                    path, number, f"expected one JSON object a line, got {line[:80].decode(errors='replace')!r}: {e}"
                )


def _csv(raw: bytes, path: str) -> Iterator[Item]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(decode(raw, path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as e:
            yield _malformed(path, reader.line_num, f"malformed CSV: {e}")
            return
        if cells is None:
            return
        if header is None and cells:
            header = cells
            if len(set(header)) != len(header):
                yield _malformed(path, line, f"expected every column once, got the header {header}")
                return
        elif header is not None and len(cells) == len(header):
            yield FileRow(zip(header, cells, strict=True), path, line)
        elif header is not None and cells:
            yield _malformed(path, line, f"expected {len(header)} columns as in the header, got {len(cells)}")


def _parquet(raw: bytes, path: str) -> Iterator[Item]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        msg = f"{path}: reading .parquet needs pyarrow: pip install 'prefixfast[data]', or write the rows as .jsonl"
        raise DataError(msg, path=path) from e
    number = 0
    try:
        for batch in parquet.ParquetFile(io.BytesIO(raw)).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield FileRow(value, path, number)
    except (ValueError, OSError, arrow.ArrowException) as e:
        yield _malformed(path, number + 1, f"cannot be read: {e}")


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _row(value: Any, path: str, line: int) -> Item:
    if not isinstance(value, dict):
        return _malformed(path, line, f"expected a mapping, got {type(value).__name__}")
    return FileRow(value, path, line)


def _no_list(text: str, path: str) -> DataError:
    try:
        got = type(json.loads(text)).__name__
    except (ValueError, RecursionError) as e:
        return _malformed(path, getattr(e, "lineno", 1), f"expected JSON: {e}")
    return _malformed(
        path, 1, f"expected a JSON list of objects, got {got}; for the official files of a task there is read_task"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that is given twice would lose a value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        msg = f"key {next(k for k in keys if keys.count(k) > 1)!r} is given twice in one object"
        raise ValueError(msg)
    return found


def _malformed(path: str, line: int, what: str) -> DataError:
    return DataError(f"{path}:{line}: {what}", path=path, line=line)


def _skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at
