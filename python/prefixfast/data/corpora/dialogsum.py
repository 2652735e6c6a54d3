"""DialogSum: JSON lines with ``fname``, ``dialogue``, ``summary``, ``topic``, and three test summaries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.official import Corpus, Counts
from prefixfast.data.corpora.summaries import document_row, place, summary_items
from prefixfast.data.files import FileRow, Item
from prefixfast.data.row_values import check_text, text_value

NUMBERED = ("summary1", "summary2", "summary3")


def dialogsum_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a file of DialogSum, or of a folder of such files by split.

    Outside of training, rows of one dialogue are one with ``refs``, as tables of the corpus have its test summaries.
    """
    items = summary_items(path, split, _parse_hidden if split == "test" else _parse)
    if split == "train":
        yield from items
        return
    joined: dict[JSON, FileRow] = {}
    for item in items:
        if not isinstance(item, FileRow) or "document" not in item:
            yield item
        elif (first := joined.get(item["document"])) is None:
            joined[item["document"]] = item
        else:
            refs = [*_texts(first), *_texts(item)]
            first.pop("summary", None)
            first["refs"] = refs
    yield from joined.values()


def _parse(entry: FileRow) -> FileRow:
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
