"""The E2E files: CSV with ``mr`` (meaning representation) and ``ref``, with ``MR`` alone, and those of Li & Liang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.e2e_source import source_items
from prefixfast.data.corpora.official import Corpus, Counts, row_items
from prefixfast.data.files import FileRow, Item
from prefixfast.data.rows import row_error
from prefixfast.errors import DataError


def e2e_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of an E2E file; outside of training, rows of one meaning representation are one with ``refs``."""
    joined: dict[str, tuple[FileRow, list[JSON]]] = {}
    is_source = path.name.lower().endswith((".txt", ".txt.gz"))
    for item in source_items(path) if is_source else row_items(path, "mr"):
        if isinstance(item, DataError):
            yield item
            continue
        mr, ref = item.get("mr"), item.get("ref")
        if empty := [key for key in ("mr", "ref") if key in item and item[key] in (None, "")]:
            yield row_error(item, 0, f"{empty[0]}: expected text, got an empty cell; leave the row out")
        elif split == "train" or not isinstance(mr, str) or not isinstance(ref, str):
            yield item
        elif mr in joined:
            joined[mr][1].append(ref)
        else:
            refs: list[JSON] = [ref]
            joined[mr] = FileRow({"mr": mr, "refs": refs}, item.path, item.line), refs
    yield from (row for row, _ in joined.values())


E2E = Corpus(
    "e2e",
    "the repository tuetschek/e2e-dataset; the texts of Li & Liang are in XiangLi1999/PrefixTuning, folder "
    "data/e2e_data",
    e2e_items,
    {
        "train": (Counts(42061, 42061),),
        "dev": (Counts(547, 4672),),
        "test": (Counts(630, 4693), Counts(630, 0, "without texts")),
    },
)
