"""The E2E files: CSV with the columns ``mr`` (meaning representation) and ``ref`` (reference)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.official import Corpus, Counts
from prefixfast.data.files import FileRow, Item, file_items
from prefixfast.errors import DataError


def e2e_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of an E2E file; outside of training, rows of one meaning representation are one with ``refs``."""
    joined: dict[str, tuple[FileRow, list[JSON]]] = {}
    for item in file_items(path):
        if isinstance(item, DataError):
            yield item
            continue
        mr, ref = item.get("mr"), item.get("ref")
        if split == "train" or not isinstance(mr, str) or not isinstance(ref, str):
            yield item
        elif mr in joined:
            joined[mr][1].append(ref)
        else:
            refs: list[JSON] = [ref]
            joined[mr] = FileRow({"mr": mr, "refs": refs}, item.path, item.line), refs
    yield from (row for row, _ in joined.values())


E2E = Corpus(
    "e2e",
    "the repository tuetschek/e2e-dataset",
    e2e_items,
    {
        "train": (Counts(42061, 42061),),
        "dev": (Counts(547, 4672),),
        "test": (Counts(630, 4693, "testset_w_refs.csv"), Counts(630, 0, "testset.csv")),
    },
)
