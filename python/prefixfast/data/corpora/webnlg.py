"""The files of the WebNLG challenges of 2017 and 2020: XML, a folder of XML files, and JSON."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.split_files import split_file, split_files, visible_files
from prefixfast.data.corpora.split_rows import row_items, with_texts
from prefixfast.data.corpora.triples_xml import XmlEntry, xml_entries
from prefixfast.data.files import FileRow, Item, file_kind, json_objects, parse_item, read_text
from prefixfast.data.row_values import check_text
from prefixfast.data.rows import row_error
from prefixfast.errors import DataError, shown

logger = logging.getLogger(__name__)
ENTRIES = re.compile(r'\s*\{\s*"entries"\s*:\s*')
XML, JSON_KIND = ".xml", ".json"
# Categories of the training splits; the test splits have others too. Entries of 2020 have the attribute shape.
SEEN_2017 = frozenset(
    {
        "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University",
        "WrittenWork",
    }
)  # fmt: skip
SEEN_2020 = SEEN_2017 | {"Artist", "Athlete", "CelestialBody", "Company", "MeanOfTransportation", "Politician"}


def webnlg_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a WebNLG file or folder, with ``triples``, ``refs``, ``category``, ``subset`` and ``id``.

    A folder is read as all of its XML files of the split, or without any XML as the JSON file of the split.

    In training, lexicalisations with another comment than "good", and entries without any left, are left out. Where an
    entry has texts in another language beside its English ones, it is read in that language alone.
    """
    kinds = {file_kind(f) for f in visible_files(path)} if path.is_dir() else {JSON_KIND}
    if XML in kinds or JSON_KIND not in kinds:
        yield from _rows(_folder_entries(path, split), split, path)
        return
    for file in split_file(path, split, (JSON_KIND,)):
        entries = _file_entries(file)
        # Without official entries it is a file of rows, whose reader reports anything else.
        yield from row_items(file, "triples") if entries is None else _rows(entries, split, file)


def _file_entries(path: Path) -> Iterator[Item] | None:
    """Entries of an official file; None for another file."""
    if file_kind(path) == XML:
        return _xml_rows(path)
    if file_kind(path) != JSON_KIND or (start := ENTRIES.match(text := read_text(path))) is None:
        return None
    objects = json_objects(text, str(path), start.end(), closing="}")
    return (o if isinstance(o, DataError) else parse_item(_json_entry, o) for o in objects)


def _rows(entries: Iterator[Item], split: str, path: Path) -> Iterator[Item]:
    """Rows of entries, in training with their texts of good quality alone."""
    left_out = 0

    def rows() -> Iterator[Item]:
        nonlocal left_out
        for entry in entries:
            row = entry if isinstance(entry, DataError) else parse_item(_row, entry)
            if isinstance(row, FileRow):
                texts: Any = row.pop("texts")
                kept = [x for x in texts if split != "train" or x.get("comment") in (None, "", "good")]
                left_out += len(texts) - len(kept)
                row |= {"refs": [x["text"] for x in kept]} if kept else {}
            yield row

    yield from with_texts(rows(), path) if split == "train" else rows()
    if left_out:
        logger.info('%s: %d lexicalisations without the comment "good" are left out', path, left_out)


def _folder_entries(folder: Path, split: str) -> Iterator[Item]:
    """Entries of all files, each once: a test folder holds one test several times, for example without its texts."""
    try:
        files = split_files(folder, split, (XML,))
    except DataError as e:
        yield e
        return
    found: dict[tuple[JSON, ...], str] = {}
    for file in files:
        for entry in _xml_rows(file):
            if isinstance(entry, FileRow):
                names = tuple(entry.get(name) for name in ("category", "eid", "size"))
                if found.setdefault(names, entry.path) != entry.path:
                    message = f"expected each entry once, got this one in {found[names]} too; give one of the two files"
                    yield row_error(entry, 0, message)
                    return
            yield entry


def _xml_rows(path: Path) -> Iterator[Item]:
    for entry in xml_entries(path):
        yield entry if isinstance(entry, DataError) else _xml_entry(entry, path)


def _xml_entry(entry: XmlEntry, path: Path) -> FileRow:
    triples: list[JSON] = [list(t) for t in entry.triples]
    texts: list[JSON] = list(entry.texts)
    values: dict[str, JSON] = dict(entry.attributes)
    return FileRow(values | {"triples": triples, "texts": texts}, str(path), entry.line)


def _json_entry(item: FileRow) -> FileRow:
    """The entry inside ``{"1": {...}}``, with the keys of an XML entry."""
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
    triples: list[JSON] = [[check_text(item, 0, name, t.get(name)) for name in names] for t in statements]
    values = {k: entry[k] for k in ("category", "shape", "size") if entry.get(k) is not None}
    number = next((entry[k] for k in ("eid", "xml_id") if entry.get(k) is not None), next(iter(item)))
    made: list[JSON] = [{**x, "text": x["lex"]} for x in texts]
    return FileRow({**values, "eid": number, "triples": triples, "texts": made}, item.path, item.line)


def _row(entry: FileRow) -> FileRow:
    """Row of an entry; ``texts`` are those of its language."""
    category = check_text(entry, 0, "category", entry.get("category"))
    number = check_text(entry, 0, "eid", entry.get("eid"))
    every: Any = entry["texts"]
    for text in every:
        if not text["text"].strip():
            raise row_error(entry, 0, "lex: expected a text, got an empty one")
        for name in ("comment", "lang"):
            if text.get(name) is not None:
                check_text(entry, 0, name, text[name])
    languages = sorted({x.get("lang") or "en" for x in every})
    others = [name for name in languages if name != "en"]
    if len(others) > 1:
        raise row_error(entry, 0, f"lang: expected texts in one language beside English, got {', '.join(others)}")
    texts = [x for x in every if not others or x.get("lang") in others]
    shape = entry.get("shape")
    seen = SEEN_2017 if shape in (None, "NA") else SEEN_2020
    row: dict[str, JSON] = {"triples": entry["triples"], "texts": texts, "category": category}
    row |= {"subset": "seen" if category in seen else "unseen", "id": number}
    row |= {} if shape in (None, "NA") else {"shape": check_text(entry, 0, "shape", shape)}
    row |= {"lang": others[0]} if others else {}
    return FileRow(row, entry.path, entry.line)


WEBNLG = Corpus(
    "webnlg",
    "the repository shimorina/webnlg-dataset, release_v3.0 for 2020; the files of 2017 are in XiangLi1999/PrefixTuning "
    "too, folder data/webnlg_challenge_2017",
    webnlg_items,
    {
        "train": (
            Counts(6935, 18025, "2017", left_out=77),
            Counts(13228, 35410, "2020, train and dev for the challenge", left_out=5),
            Counts(5573, 14630, "release 3.0, Russian", lang="ru"),
            Counts(5585, 14612, "2020, train and dev for the challenge, Russian", lang="ru"),
        ),
        "dev": (
            Counts(872, 2268, "2017"),
            Counts(1667, 4464, "release 3.0"),
            Counts(1669, 4468, "2020, train and dev for the challenge"),
            Counts(790, 2065, "release 3.0, Russian", lang="ru"),
            Counts(793, 2068, "2020, train and dev for the challenge, Russian", lang="ru"),
        ),
        "test": (
            Counts(1862, 4928, "2017"),
            Counts(1862, 0, "2017 without texts"),
            Counts(891, 2433, "2017, unseen categories"),
            Counts(971, 2495, "2017, seen categories"),
            Counts(1779, 5150, "2020"),
            Counts(1779, 0, "2020 without texts"),
            Counts(1102, 2780, "2020, Russian", lang="ru"),
            Counts(1102, 0, "2020 without texts, Russian", lang="ru"),
        ),
    },
)
