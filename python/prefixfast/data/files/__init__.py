"""Readers of row files. A reader yields each row with its line, and a `DataError` in place of each malformed row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prefixfast.data.files.delimited import delimited_items
from prefixfast.data.files.encodings import as_utf8, check_encoding
from prefixfast.data.files.items import FileRow, Item, ListCell, MappingCell, parse_item
from prefixfast.data.files.json_rows import json_items, json_objects
from prefixfast.data.files.kinds import SPREADSHEETS, refused_content, refused_suffix
from prefixfast.data.files.names import renaming
from prefixfast.data.files.parquet import parquet_items
from prefixfast.data.files.raw import ROW_BYTES, Expansion, read_bytes
from prefixfast.data.files.xml_tree import XmlElement, read_xml
from prefixfast.errors import DataError

__all__ = [
    "ENDINGS",
    "SPREADSHEETS",
    "SUFFIXES",
    "FileRow",
    "Item",
    "ListCell",
    "MappingCell",
    "XmlElement",
    "check_encoding",
    "file_items",
    "file_kind",
    "json_line_items",
    "json_objects",
    "parse_item",
    "read_text",
    "read_xml",
]
TextReader = Callable[[bytes, str, str], Iterator[Item]]
TEXT_READERS: dict[str, TextReader] = {
    ".jsonl": json_items,
    ".ndjson": json_items,
    ".json": json_items,
    ".csv": delimited_items,
    ".tsv": delimited_items,
}
PARQUET = ".parquet"
SUFFIXES = (*TEXT_READERS, PARQUET)
ENDINGS = f"{', '.join(SUFFIXES)} (also with .gz)"


def file_items(path: Path, encoding: str | None = None, *, has_option: bool = False) -> Iterator[Item]:
    """Yield the rows of a file in order, and a `DataError` in place of each malformed row.

    An error after which the rest of the file cannot be read is the last item.

    Args:
        path: Path of the file; its suffix, before ``.gz``, chooses the reader.
        encoding: Encoding of a text file. None takes the encoding of the byte order mark, or UTF-8 without one.
        has_option: Whether the user can name an encoding, which an error then advises.

    Raises:
        DataError: If the whole file cannot be read.
        ConfigError: If the encoding is unknown.
    """
    check_encoding(encoding)
    kind = file_kind(path)
    if kind not in SUFFIXES:
        advice = "a folder" if path.is_dir() else refused_suffix(kind)
        msg = f"{path}: expected a file ending in {ENDINGS}" + (f", got {advice}" if advice else "")
        raise DataError(msg, path=str(path))
    raw = read_bytes(path)
    _check_content(raw, path, kind)
    if kind == PARQUET:
        items = parquet_items(raw, str(path))
    else:
        raw = as_utf8(raw, str(path), encoding, has_option=has_option)
        items = TEXT_READERS[kind](raw, str(path), kind)
    yield from map(renaming(), _few_rows(items, path))


def json_line_items(raw: bytes, name: str, encoding: str | None = None) -> Iterator[Item]:
    """Yield the rows of JSON lines that are no file, and a `DataError` in place of each malformed row.

    Args:
        raw: JSON lines, or a JSON list of objects.
        name: Name of their source, for errors.
        encoding: Encoding. None takes the encoding of the byte order mark, or UTF-8 without one.
    """
    yield from map(renaming(), json_items(as_utf8(raw, name, encoding, has_option=True), name, ".jsonl"))


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, decompressed if the file's name ends in ``.gz``.

    Raises:
        DataError: If the file cannot be read, its content is of a kind that is no text, or the bytes are not UTF-8,
            with the line.
    """
    raw = read_bytes(path)
    _check_content(raw, path, file_kind(path))
    return as_utf8(raw, str(path)).decode()


def file_kind(path: Path) -> str:
    """Suffix of a file in lower case, before ``.gz``."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _few_rows(items: Iterable[Item], path: Path) -> Iterator[Item]:
    """Yield the rows of a file, and the error of a compressed file with more rows than its size allows.

    A row takes far more memory than the few bytes that it can have in a file.
    """
    expansion = Expansion.of_file(path)
    for item in items:
        if path.suffix.lower() == ".gz":
            try:
                expansion.add(ROW_BYTES)
            except DataError as e:
                yield e
                return
        yield item


def _check_content(raw: bytes, path: Path, kind: str) -> None:
    """Raise `DataError` for content of another kind than the suffix says."""
    if advice := refused_content(raw, path, kind):
        msg = f"{path}: expected the content of a {kind} file, got {advice}"
        raise DataError(msg, path=str(path))
