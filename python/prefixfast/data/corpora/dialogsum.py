"""DialogSum: JSON lines with ``fname``, ``dialogue``, ``summary``, ``topic``, and three test summaries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.official import Corpus, Counts
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
    if split == "train":
        yield from items
        return
    groups: dict[JSON, list[FileRow]] = {}
    for item in items:
        if not isinstance(item, FileRow):
            yield item
            continue
        group = groups.setdefault(item["document"], [])
        if (name := item.get("id")) is not None and name in (other.get("id") for other in group):
            yield row_error(item, 0, f"id: expected another one for each row of a dialogue, got {shown(name)} again")
        else:
            group.append(item)
    yield from map(_joined, groups.values())


def _joined(rows: list[FileRow]) -> FileRow:
    """The row with the texts of all rows of one dialogue."""
    first, *more = rows
    if not more:
        return first
    texts: list[JSON] = [text for row in rows for text in _texts(row)]
    return FileRow({k: v for k, v in first.items() if k != "summary"} | {"refs": texts}, *place(first))


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


def _texts(row: FileRow) -> list[JSON]:
    refs = row.get("refs")
    return refs if isinstance(refs, list) else [row["summary"]] if "summary" in row else []


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
