"""The files of the WebNLG 2017 challenge: JSON with ``modifiedtripleset`` and ``lexicalisations``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixfast.data.corpora.official import Corpus
from prefixfast.data.files import FileRow, Item, file_items, json_objects, parse_item, read_text
from prefixfast.data.row_values import check_text
from prefixfast.data.rows import row_error
from prefixfast.errors import DataError, shown

logger = logging.getLogger(__name__)
ENTRIES = re.compile(r'\s*\{\s*"entries"\s*:\s*')


def webnlg_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a WebNLG file, with ``triples``, ``refs``, ``category`` and ``id``.

    In training, lexicalisations without the comment "good", and entries without a good one, are left out.
    """
    good_only = split == "train"
    if ".json" not in path.suffixes:
        yield from file_items(path)
        return
    text = read_text(path)
    start = ENTRIES.match(text)
    if start is None:
        yield from file_items(path)  # a list of rows; this reader reports anything else
        return
    left_out = 0
    for item in json_objects(text, str(path), start.end(), closing="}"):
        row = item if isinstance(item, DataError) else parse_item(_parse_entry, item)
        if isinstance(row, FileRow):
            every: Any = row.pop("lexicalisations")
            kept = [x for x in every if x.get("comment") == "good"] if good_only else every
            left_out += len(every) - len(kept)
            if good_only and not kept:
                continue
            row |= {"refs": [x["lex"] for x in kept]} if kept else {}
        yield row
    if left_out:
        logger.info('%s: %d lexicalisations without the comment "good" are left out', path, left_out)


def _parse_entry(item: FileRow) -> FileRow:
    """Parse one entry ``{"1": {...}}``; the row keeps the lexicalisations as they are in the file."""
    entry: Any = next(iter(item.values()), None)
    if len(item) != 1 or not isinstance(entry, dict):
        raise row_error(item, 0, f"expected an entry with its number as the only key, got the keys {sorted(item)}")
    statements, texts = entry.get("modifiedtripleset"), entry.get("lexicalisations", [])
    if not isinstance(statements, list) or not statements or not all(isinstance(t, dict) for t in statements):
        raise row_error(item, 0, f"modifiedtripleset: expected a list of objects, got {shown(statements)}")
    if not isinstance(texts, list) or not all(isinstance(x, dict) for x in texts):
        raise row_error(item, 0, f"lexicalisations: expected a list of objects, got {shown(texts)}")
    for x in texts:
        check_text(item, 0, "lex", x.get("lex"))
    names = ("subject", "property", "object")
    triples = [[check_text(item, 0, name, t.get(name)) for name in names] for t in statements]
    extra = {"category": entry.get("category"), "id": entry.get("eid", next(iter(item)))}
    return FileRow({"triples": triples, "lexicalisations": texts, **extra}, item.path, item.line)


WEBNLG = Corpus("webnlg", "the repository of the WebNLG challenge, shimorina/webnlg-dataset", webnlg_items, {})
