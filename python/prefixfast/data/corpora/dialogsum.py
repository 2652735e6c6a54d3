"""DialogSum: JSON lines with ``fname``, ``dialogue``, ``summary``, ``topic``, and three test summaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.split_rows import join_inputs
from prefixfast.data.corpora.summaries import check_id, document_row, place, summary_items
from prefixfast.data.files import FileRow, Item
from prefixfast.data.row_values import check_text, text_value
from prefixfast.data.rows import row_error
from prefixfast.errors import shown

NUMBERED = ("summary1", "summary2", "summary3")


def dialogsum_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a file of DialogSum, or of a folder of such files by split.

    Outside of training, rows of one dialogue are one with ``refs``, as tables of the corpus have its test summaries.
    """
    items = summary_items(path, split, _parse_hidden if split == "test" else _parse)
    yield from items if split == "train" else join_inputs(_once(items), "document", "document")


def _once(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the rows, and an error in place of one whose dialogue had a row of the same identifier before."""
    seen: set[tuple[JSON, JSON]] = set()
    for item in items:
        known = (item["document"], item["id"]) if isinstance(item, FileRow) and item.get("id") is not None else None
        if isinstance(item, FileRow) and known in seen:
            expected = "expected another one for each row of a dialogue"
            yield row_error(item, 0, f"id: {expected}, got {shown(item['id'])} again")
            continue
        seen |= {known} if known else set()
        yield item


def _parse(entry: FileRow) -> FileRow:
    check_id(entry, "fname")
    row = FileRow({"id": entry["fname"]} | entry, *place(entry)) if "fname" in entry and "id" not in entry else entry
    if NUMBERED[0] not in entry:
        return document_row(row, "dialogue", "summary")
    refs: list[JSON] = [text_value(entry, 0, key) for key in NUMBERED]
    texts = {"document": check_text(entry, 0, "dialogue", entry.get("dialogue")), "refs": refs}
    return FileRow(texts | {k: v for k, v in row.items() if k not in ("dialogue", *NUMBERED)}, *place(entry))


def _parse_hidden(entry: FileRow) -> FileRow:
    """Row of a test file, whose summaries are not public for the hidden test."""
    if not str(entry.get("fname")).startswith("hiddentest") or "summary" in entry:
        return _parse(entry)
    row = document_row(FileRow(entry | {"summary": ""}, *place(entry)), "dialogue", "summary")
    return FileRow({k: v for k, v in row.items() if k != "summary"} | {"id": entry["fname"]}, *place(entry))


DIALOGSUM = Corpus(
    "dialogsum",
    "the repository cylnlp/dialogsum",
    dialogsum_items,
    {
        "train": (Counts(12460, 12460),),
        "dev": (Counts(500, 500),),
        "test": (Counts(500, 1500), Counts(100, 0, "the hidden test")),
    },
)
