"""The official files of the paper's tasks: E2E as CSV, WebNLG 2017 and DART v1.1.1 as JSON."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixfast.data.files import FileRow, Item, decode, items, objects, read_bytes
from prefixfast.data.formats import checked
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
SPLITS = ("train", "dev", "test")
ENTRIES = re.compile(r'\s*\{\s*"entries"\s*:\s*')


def read_task(task: str, path: str | Path, split: str = "train") -> list[Row]:
    """Rows of an official file of a task; any other task's files, and files of rows, are read as `read_rows` does.

    Args:
        task: ``"e2e"``: a CSV with the columns ``mr`` and ``ref``. ``"webnlg"``: the 2017 challenge's JSON (``modifiedtripleset``, ``lexicalisations``).
            ``"dart"``: v1.1.1's JSON (``tripleset``, ``annotations``).
        path: The file, also with .gz.
        split: ``"train"``: of WebNLG only the lexicalisations with the comment "good", as the authors trained. ``"dev"``, ``"test"``: all of them, and E2E's
            rows of one meaning representation become one row with ``refs``, as evaluation needs them.

    Returns:
        Rows with ``mr`` or ``triples`` and ``ref`` or ``refs``; of WebNLG with ``category`` and ``id`` too, of DART with the ``source`` of its first text.

    Raises:
        ConfigError: For an unknown split.
        DataError: For a malformed file, with path and line.

    Example:
        ``train(base, read_task("webnlg", "webnlg/train.json"), task="webnlg")``
    """
    rows: list[Row] = []
    for item in task_items(task, Path(path), split):
        if isinstance(item, DataError):
            raise item
        rows.append(item)
    if not rows:
        msg = f"{path}: expected at least one row, got none"
        raise DataError(msg, path=str(path))
    return rows


def task_items(task: str, path: Path, split: str) -> Iterator[Item]:
    """What `read_task` reads, with a `DataError` in place of each malformed entry."""
    if split not in SPLITS:
        msg = f"split: expected one of {', '.join(SPLITS)}, got {split!r}"
        raise ConfigError(msg)
    is_json = ".json" in path.suffixes
    if task == "webnlg" and is_json:
        yield from _webnlg(path, good_only=split == "train")
    elif task == "dart" and is_json:
        yield from (
            item if isinstance(item, DataError) or "triples" in item else _guarded(_dart, item) for item in items(path)
        )
    elif task == "e2e":
        yield from _e2e(path, grouped=split != "train")
    else:
        yield from items(path)


def _e2e(path: Path, *, grouped: bool) -> Iterator[Item]:
    by_mr: dict[str, FileRow] = {}
    for item in items(path):
        if isinstance(item, DataError):
            yield item
            continue
        row = FileRow({k.lower() if k in ("MR", "REF") else k: v for k, v in item.items()}, item.path, item.line)
        mr, ref = row.get("mr"), row.get("ref")
        if not grouped or not isinstance(mr, str) or not isinstance(ref, str):
            yield row
        elif mr in by_mr:
            by_mr[mr]["refs"].append(ref)
        else:
            by_mr[mr] = FileRow({"mr": mr, "refs": [ref]}, row.path, row.line)
    yield from by_mr.values()


def _webnlg(path: Path, *, good_only: bool) -> Iterator[Item]:
    text = decode(read_bytes(path), str(path))
    start = ENTRIES.match(text)
    if start is None:
        yield from items(path)  # a list of rows; anything else is refused there
        return
    left_out = 0
    for item in objects(text, str(path), start.end(), closing="}"):
        row = item if isinstance(item, DataError) else _guarded(_entry, item)
        if isinstance(row, FileRow) and good_only:
            given = row["lexicalisations"]
            row["lexicalisations"] = [x for x in given if x.get("comment") == "good"]
            left_out += len(given) - len(row["lexicalisations"])
        if isinstance(row, FileRow):
            refs = [x["lex"] for x in row.pop("lexicalisations")]
            if good_only and not refs:
                continue
            row |= {"refs": refs} if refs else {}
        yield row
    if left_out:
        logger.info('%s: %d lexicalisations without the comment "good" are left out', path, left_out)


def _entry(item: FileRow) -> FileRow:
    """One entry ``{"1": {...}}``, its lexicalisations as they are."""
    entry: Any = next(iter(item.values()), None)
    if len(item) != 1 or not isinstance(entry, dict):
        raise row_error(item, 0, f"expected an entry with its number as the only key, got the keys {sorted(item)}")
    statements, texts = entry.get("modifiedtripleset"), entry.get("lexicalisations", [])
    if not isinstance(statements, list) or not statements or not all(isinstance(t, dict) for t in statements):
        raise row_error(item, 0, f"modifiedtripleset: expected a list of objects, got {statements!r:.80}")
    if not isinstance(texts, list) or not all(isinstance(x, dict) for x in texts):
        raise row_error(item, 0, f"lexicalisations: expected a list of objects, got {texts!r:.80}")
    for x in texts:
        checked(item, 0, "lex", x.get("lex"))
    triples = [[checked(item, 0, name, t.get(name)) for name in ("subject", "property", "object")] for t in statements]
    extra = {"category": entry.get("category"), "id": entry.get("eid", next(iter(item)))}
    return FileRow({"triples": triples, "lexicalisations": texts, **extra}, item.path, item.line)


def _dart(item: FileRow) -> FileRow:
    triples, notes = item.get("tripleset"), item.get("annotations", [])
    if not isinstance(triples, list) or not all(isinstance(t, list) and len(t) == 3 for t in triples) or not triples:
        raise row_error(item, 0, f"tripleset: expected a list of [subject, relation, object], got {triples!r:.80}")
    if not isinstance(notes, list) or not all(isinstance(n, dict) for n in notes):
        raise row_error(item, 0, f"annotations: expected a list of objects, got {notes!r:.80}")
    for t in triples:
        for place in t:
            checked(item, 0, "tripleset", place)
    refs = [checked(item, 0, "text", n.get("text")) for n in notes]
    return FileRow(
        {"triples": triples} | ({"refs": refs, "source": notes[0].get("source")} if refs else {}), item.path, item.line
    )


def _guarded(make: Any, item: FileRow) -> Item:
    """The row that ``make`` reads from an entry, or its error."""
    try:
        return make(item)
    except DataError as e:
        return e
