"""The files of DART v1.1.1: a JSON list with ``tripleset`` and ``annotations``, and XML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.split_files import split_file
from prefixfast.data.corpora.split_rows import own_row, with_texts
from prefixfast.data.corpora.triples_xml import XmlEntry, xml_entries
from prefixfast.data.files import SUFFIXES, FileRow, Item, file_items, file_kind, parse_item
from prefixfast.data.row_values import check_text
from prefixfast.data.rows import row_error
from prefixfast.errors import DataError, shown

XML = ".xml"


def dart_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a DART file, or of a folder of such files by split.

    Rows have ``triples``, ``refs`` and the ``source`` of the first text. Empty texts, of which the official test split
    has one, are left out, and in training entries without any other.
    """
    for file in split_file(path, split, SUFFIXES, (XML,)):
        items = _file_items(file, split)
        yield from with_texts(items, file) if split == "train" else items


def _file_items(path: Path, split: str) -> Iterator[Item]:
    if file_kind(path) == XML:
        for entry in xml_entries(path):
            yield entry if isinstance(entry, DataError) else _xml_row(entry, path)
        return
    for item in file_items(path):
        is_row = isinstance(item, FileRow) and "triples" in item
        yield own_row(item, split) if is_row or isinstance(item, DataError) else parse_item(_parse_entry, item)


def _xml_row(entry: XmlEntry, path: Path) -> FileRow:
    triples: list[JSON] = [list(t) for t in entry.triples]
    texts = [(str(x["text"]), x.get("comment")) for x in entry.texts]
    return FileRow({"triples": triples} | _annotated(texts), str(path), entry.line)


def _annotated(texts: list[tuple[str, JSON]]) -> dict[str, JSON]:
    """References and the source of the first one, from texts with their sources; empty without texts."""
    kept = [(text, source) for text, source in texts if text.strip()]
    return {"refs": [text for text, _ in kept], "source": kept[0][1]} if kept else {}


def _parse_entry(item: FileRow) -> FileRow:
    triples: Any = item.get("tripleset")
    notes: Any = item.get("annotations", [])
    if not isinstance(triples, list) or not all(isinstance(t, list) and len(t) == 3 for t in triples) or not triples:
        raise row_error(item, 0, f"tripleset: expected a list of [subject, relation, object], got {shown(triples)}")
    if not isinstance(notes, list) or not all(isinstance(n, dict) for n in notes):
        raise row_error(item, 0, f"annotations: expected a list of objects, got {shown(notes)}")
    for triple in triples:
        for text in triple:
            check_text(item, 0, "tripleset", text)
    texts = [(check_text(item, 0, "text", n.get("text")), n.get("source")) for n in notes]
    return FileRow({"triples": triples} | _annotated(texts), item.path, item.line)


DART = Corpus(
    "dart",
    "the repository Yale-LILY/dart, folder data/v1.1.1",
    dart_items,
    {
        "train": (Counts(30526, None),),  # 62,659 texts with the empty ones, whose number is not given
        "dev": (Counts(2768, 6980),),
        "test": (Counts(5097, 12551),),
    },
)
