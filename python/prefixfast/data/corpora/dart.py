"""The files of DART v1.1.1: a JSON list with ``tripleset`` and ``annotations``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixfast.data.corpora.official import Corpus, Counts
from prefixfast.data.files import FileRow, Item, file_items, parse_item
from prefixfast.data.row_values import check_text
from prefixfast.data.rows import row_error
from prefixfast.errors import DataError, shown


def dart_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a DART file, with ``triples``, ``refs`` and the ``source`` of the first text."""
    for item in file_items(path):
        is_row = isinstance(item, DataError) or "triples" in item
        yield item if isinstance(item, DataError) or is_row else parse_item(_parse_entry, item)


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
    refs = [check_text(item, 0, "text", n.get("text")) for n in notes]
    annotated = {"refs": refs, "source": notes[0].get("source")} if refs else {}
    return FileRow({"triples": triples} | annotated, item.path, item.line)


DART = Corpus(
    "dart",
    "the repository Yale-LILY/dart, folder data/v1.1.1",
    dart_items,
    {"dev": (Counts(2768, 6980),)},
)
