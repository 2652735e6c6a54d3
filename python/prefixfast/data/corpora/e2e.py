"""The E2E files: CSV with ``mr`` (meaning representation) and ``ref``, with ``MR`` alone, and those of Li & Liang."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.e2e_source import source_items
from prefixfast.data.corpora.split_files import split_file
from prefixfast.data.corpora.split_rows import join_inputs, row_items
from prefixfast.data.files import SUFFIXES, FileRow, Item, file_kind
from prefixfast.data.rows import row_error
from prefixfast.errors import DataError

TEXTS = ".txt"  # of Li & Liang


def e2e_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of an E2E file, or of a folder of such files by split.

    Outside of training, rows of one meaning representation are one with ``refs``.
    """
    files = split_file(path, split, SUFFIXES, (TEXTS,))
    items = itertools.chain.from_iterable(map(_file_items, files))
    yield from items if split == "train" else join_inputs(map(_with_refs, items), "mr", "table")


def _file_items(path: Path) -> Iterator[Item]:
    yield from source_items(path) if file_kind(path) == TEXTS else map(_checked, row_items(path, "mr"))


def _checked(item: Item) -> Item:
    """The row, or the error of an empty cell, with which a row would have no text or no input."""
    if isinstance(item, DataError):
        return item
    empty = [k for k in ("mr", "ref") if k in item and item[k] in (None, "")]
    if not empty or (empty == ["ref"] and item["ref"] is None and item.get("refs") is not None):
        return item
    return row_error(item, 0, f"{empty[0]}: expected text, got an empty cell; leave the row out")


def _with_refs(item: Item) -> Item:
    """The row with its only text as ``refs``."""
    if isinstance(item, DataError) or not isinstance(ref := item.get("ref"), str) or item.get("refs") is not None:
        return item
    refs: list[JSON] = [ref]
    return FileRow({k: v for k, v in item.items() if k not in ("ref", "refs")} | {"refs": refs}, item.path, item.line)


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
