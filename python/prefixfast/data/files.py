"""Readers of row files. A reader yields each row with its line, and a `DataError` in place of each malformed row."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError, printable, shown
from prefixfast.io.untrusted import file_size

WHITE_SPACE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"


class FileRow(dict[str, JSON]):
    """A row that keeps its file and line.

    Attributes:
        path: Path of the file.
        line: Line on which the row begins, counted from 1; in a ``.parquet`` file the number of the row.
    """

    __slots__ = ("line", "path")

    def __init__(self, values: Mapping[str, JSON] | Iterable[tuple[str, JSON]], path: str, line: int) -> None:
        super().__init__(values)
        self.path, self.line = path, line

    def __reduce__(self) -> tuple[object, ...]:
        return FileRow, (dict(self), self.path, self.line)


Item = FileRow | DataError


def file_items(path: Path) -> Iterator[Item]:
    """Yield the rows of a file in order, and a `DataError` in place of each malformed row.

    An error after which the rest of the file cannot be read is the last item.

    Raises:
        DataError: If the whole file cannot be read.
    """
    suffixes = [s for s in path.suffixes if s != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        msg = f"{path}: expected a file ending in {', '.join(READERS)} (also with .gz)"
        raise DataError(msg, path=str(path))
    yield from READERS[kind](read_bytes(path), str(path))


def parse_item(parse: Callable[[FileRow], FileRow], entry: FileRow) -> Item:
    """The row that ``parse`` makes of an entry of an official file, or the `DataError` that ``parse`` raises."""
    try:
        return parse(entry)
    except DataError as e:
        return e


def read_bytes(path: Path) -> bytes:
    """Read the bytes of a file without a byte order mark, decompressed if the file's name ends in ``.gz``.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        file_size(path)
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).removeprefix(BOM)
    except (OSError, EOFError, zlib.error, ValueError) as e:
        msg = f"{printable(str(path))}: cannot be read: {e}"
        raise DataError(msg, path=str(path)) from e


def decode_utf8(raw: bytes, path: str) -> str:
    """Decode a whole file as UTF-8.

    Raises:
        DataError: If the bytes are not UTF-8, with the line.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise _malformed(path, raw.count(b"\n", 0, e.start) + 1, f"cannot be read: expected UTF-8: {e}") from e


def json_objects(text: str, path: str, start: int, closing: str = "") -> Iterator[Item]:
    """Yield the objects of a JSON list with their lines.

    Args:
        text: Content of the whole file.
        path: Path of the file, for errors.
        start: Index in ``text`` of the list's opening bracket.
        closing: Text that must follow the list, apart from white space.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    line, counted = 1, 0
    at = _skip_space(text, start + 1)
    more = text[at : at + 1] != "]"
    while more:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            yield _malformed(path, getattr(e, "lineno", text.count("\n", 0, at) + 1), f"expected JSON: {e}")
            return
        line, counted = line + text.count("\n", counted, at), at
        yield _row(value, path, line)
        at = _skip_space(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_space(text, at + 1)
    if text[at : at + 1] != "]" or text[at + 1 :].strip(" \t\r\n") != closing:
        expected = f"']{closing}' at its end, or ',' between two objects"
        message = f"expected {expected}, got {shown(text[at : at + 20])}; is the file truncated?"
        yield _malformed(path, text.count("\n", 0, at) + 1, message)


def _read_json(raw: bytes, path: str) -> Iterator[Item]:
    text = decode_utf8(raw, path)
    start = _skip_space(text, 0)
    if text[start : start + 1] == "[":
        yield from json_objects(text, path, start)
    else:
        yield _not_a_list(text, path)


def _read_jsonl(raw: bytes, path: str) -> Iterator[Item]:
    for number, line in enumerate(io.BytesIO(raw), 1):
        if line.strip():
            try:
                yield _row(json.loads(line.decode(), object_pairs_hook=_unique_keys), path, number)
            except (ValueError, RecursionError) as e:
                start = line[:80].decode(errors="replace")
                yield _malformed(path, number, f"expected one JSON object a line, got {shown(start)}: {e}")


def _read_csv(raw: bytes, path: str) -> Iterator[Item]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(decode_utf8(raw, path), newline=""), strict=True)
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


def _read_parquet(raw: bytes, path: str) -> Iterator[Item]:
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


READERS: dict[str, Callable[[bytes, str], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _row(value: JSON, path: str, line: int) -> Item:
    if not isinstance(value, dict):
        return _malformed(path, line, f"expected a mapping, got {type(value).__name__}")
    return FileRow(value, path, line)


def _not_a_list(text: str, path: str) -> DataError:
    try:
        got = type(json.loads(text)).__name__
    except (ValueError, RecursionError) as e:
        return _malformed(path, getattr(e, "lineno", 1), f"expected JSON: {e}")
    return _malformed(
        path, 1, f"expected a JSON list of objects, got {got}; read_task reads the official files of a task"
    )


def _unique_keys(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    """Make a JSON object, and raise `ValueError` for a repeated key, whose first value would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        msg = f"key {shown(next(k for k in keys if keys.count(k) > 1))} is given twice in one object"
        raise ValueError(msg)
    return found


def _malformed(path: str, line: int, message: str) -> DataError:
    return DataError(f"{path}:{line}: {message}", path=path, line=line)


def _skip_space(text: str, start: int) -> int:
    match = WHITE_SPACE.match(text, start)
    return match.end() if match else start
