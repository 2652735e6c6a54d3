"""Layouts that several corpora of summaries share: pairs of text files, rows of documents, and folders of both."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prefixfast.data.column_names import listed
from prefixfast.data.corpora.split_files import split_file
from prefixfast.data.files import SUFFIXES, FileRow, Item, file_items, file_kind, parse_item, read_text
from prefixfast.data.row_values import check_text, references, text_value
from prefixfast.data.rows import is_table_row, row_error
from prefixfast.errors import DataError

logger = logging.getLogger(__name__)
SOURCE, TARGET = ".source", ".target"
LINE_END = re.compile(r"\r\n|\r|\n")
TEXT_KEYS = ("document", "article", "dialogue", "summary", "highlights")


def summary_items(path: Path, split: str, parse: Callable[[FileRow], FileRow]) -> Iterator[Item]:
    """Yield the rows of a file of summaries, of a ``.source`` file with its ``.target`` file, or of a folder of them.

    In training, rows whose document or summary is empty are left out, as the loaders of the public corpora do.

    Args:
        path: Path of the file. In a folder, the file whose name has the word of the split is read.
        split: Split that is read.
        parse: Function that makes the row of an entry. Entries with the key ``document`` are rows already.
    """
    for file in split_file(path, split, (*SUFFIXES, SOURCE)):
        if file_kind(file) in (SOURCE, TARGET):
            items = pair_items(file)
        else:
            items = (_parsed(item, split, parse) for item in file_items(file))
        yield from not_empty(items, file) if split == "train" else items


def pair_items(path: Path) -> Iterator[Item]:
    """Yield the rows of a ``.source`` file, one document a line, and the ``.target`` file with their summaries.

    Args:
        path: Path of either file, also with ``.gz``.

    Raises:
        DataError: If a file cannot be read, or the two differ in their number of lines.
    """
    source, target = (pair_file(path, ending) for ending in (SOURCE, TARGET))
    documents, summaries = (text_lines(read_text(file)) for file in (source, target))
    if len(documents) != len(summaries):
        counts = f"{len(documents)} lines, {target.name} has {len(summaries)}"
        line = min(len(documents), len(summaries)) + 1
        msg = f"{source}:{line}: expected as many lines as in {target.name}, got {counts}; is one of them truncated?"
        raise DataError(msg, path=str(source), line=line)
    for number, (document, summary) in enumerate(zip(documents, summaries, strict=True), 1):
        yield FileRow({"document": document, "summary": summary}, str(source), number)


def pair_file(path: Path, ending: str) -> Path:
    """The file of a pair with an ending, also in capitals or with ``.gz``; the path where it is expected without one.

    Args:
        path: Path of either file.
        ending: `SOURCE` or `TARGET`.
    """
    if file_kind(path) == ending:
        return path
    expected = path.with_name(path.name[: path.name.lower().rindex(file_kind(path))] + ending)
    if expected.exists():
        return expected
    names = (expected.name.lower(), f"{expected.name.lower()}.gz")
    inside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    return next((file for file in inside if file.name.lower() in names), expected)


def document_row(entry: FileRow, document: str, summary: str) -> FileRow:
    """Row of an entry with its text under two keys. The other columns ride along.

    Args:
        entry: Entry of a file.
        document: Key of the document.
        summary: Key of the summary.

    Raises:
        DataError: If one of the two is not a text, or the identifier is of another type than texts and integers.
    """
    texts = {"document": _text(entry, document), "summary": _text(entry, summary)}
    if (texts["document"], texts["summary"]) == (document, summary):
        raise row_error(entry, 0, "expected texts, got the names of the columns again; remove this line")
    check_id(entry, "id")
    return FileRow(texts | {k: v for k, v in entry.items() if k not in (document, summary, *texts)}, *place(entry))


def check_id(entry: FileRow, key: str) -> None:
    """Raise `DataError` for an identifier that is no text and no integer; an entry may have none."""
    value = entry.get(key)
    if value is not None and type(value) is not int:
        check_text(entry, 0, key, value)


def place(entry: FileRow) -> tuple[str, int]:
    """Path and line of a row."""
    return entry.path, entry.line


def not_empty(items: Iterable[Item], path: Path) -> Iterator[Item]:
    """Yield rows whose document and summary have text, and log the number of the others.

    Args:
        items: Rows with ``document`` and ``summary``.
        path: Path of their file.
    """
    left_out = 0
    for item in items:
        texts = [] if isinstance(item, DataError) else [item.get("document"), item.get("summary")]
        if any(isinstance(t, str) and not t.strip() for t in texts):
            left_out += 1
        else:
            yield item
    if left_out:
        logger.info("%s: %d rows whose document or summary is empty are left out", path, left_out)


def text_lines(text: str) -> list[str]:
    """Lines of a text, which end as Python's text files end them."""
    lines = LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def _parsed(item: Item, split: str, parse: Callable[[FileRow], FileRow]) -> Item:
    if isinstance(item, DataError):
        return item
    missing = [key for key in TEXT_KEYS if key in item and item[key] is None]
    # Exports of SAMSum have one dialogue of None in training; a table has None in every empty cell.
    if missing and split != "train" and item.get("refs") is None and not is_table_row(item):
        return row_error(item, 0, f"{missing[0]}: expected a string, got None (no value)")
    return parse_item(_own_row if "document" in item else parse, item)


def _own_row(row: FileRow) -> FileRow:
    """Row of a file of rows, which has the keys that `read_task` gives."""
    if row.get("refs") is None:
        return document_row(row, "document", "summary")
    check_id(row, "id")
    text_value(row, 0, "document")
    references(row, 0, "document")
    return row


def _text(entry: FileRow, key: str) -> str:
    if key in entry and entry[key] is None:
        return ""
    if key not in entry:
        raise row_error(entry, 0, f"expected the keys of the corpus, of which {key} is missing; got {listed(entry)}")
    return text_value(entry, 0, key)
