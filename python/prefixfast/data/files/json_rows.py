"""Rows of JSON files: lists of objects, JSON lines, objects that follow each other, and lists inside one object."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping

from prefixfast.config.json_types import JSON
from prefixfast.data.column_names import listed
from prefixfast.data.files.items import FileRow, Item, malformed
from prefixfast.data.formats import NAMED_KEYS
from prefixfast.errors import shown

WHITE_SPACE = re.compile(r"[ \t\r\n]*")
OFFICIAL_LISTS = ("entries",)  # key of WebNLG's files


def json_items(raw: bytes, path: str, kind: str) -> Iterator[Item]:
    """Yield the rows of a JSON file with their lines. The content decides how the file is read.

    Args:
        raw: Content of the file as UTF-8.
        path: Path of the file, for errors.
        kind: Suffix of the file. ``".json"`` is one document where the content leaves a choice, other suffixes are
            JSON lines.
    """
    start = len(raw) - len(raw.lstrip())
    if raw[start : start + 1] == b"[":
        yield from json_objects(raw.decode(), path, start=len(raw[:start].decode()))
    elif _is_json(raw[start:].partition(b"\n")[0]):
        rest = raw[start:].partition(b"\n")[2]
        yield from _json_lines(raw, path) if rest.strip() else _one_object(raw.decode(), path, kind)
    elif raw.strip():
        yield from _objects_or_lines(raw, path, kind)


def json_objects(text: str, path: str, start: int, closing: str | None = "") -> Iterator[Item]:
    """Yield the objects of a JSON list with their lines.

    Args:
        text: Content of the whole file.
        path: Path of the file, for errors.
        start: Index in ``text`` of the list's opening bracket.
        closing: Text that must follow the list, apart from white space. None leaves the rest unread.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    line, counted = 1, 0
    at = _skip_space(text, start + 1)
    more = text[at : at + 1] != "]"
    while more:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            yield malformed(path, getattr(e, "lineno", text.count("\n", 0, at) + 1), f"expected JSON: {e}")
            return
        line, counted = line + text.count("\n", counted, at), at
        yield _row(value, path, line)
        at = _skip_space(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_space(text, at + 1)
    after = "" if closing is None else text[at + 1 :].strip(" \t\r\n")
    if text[at : at + 1] != "]" or after != (closing or ""):
        expected = f"']{closing or ''}' at its end, or ',' between two objects"
        message = f"expected {expected}, got {shown(text[at : at + 20])}; is the file truncated?"
        yield malformed(path, text.count("\n", 0, at) + 1, message)


def parse_json(text: str | bytes) -> JSON:
    """Value of a JSON text.

    Raises:
        ValueError: If the text is malformed, or an object has a key twice, whose first value would be lost.
    """
    return json.loads(text, object_pairs_hook=_unique_keys)


def _json_lines(raw: bytes, path: str) -> Iterator[Item]:
    for number, line in enumerate(io.BytesIO(raw), 1):
        if line.strip():
            try:
                yield _row(parse_json(line), path, number)
            except (ValueError, RecursionError) as e:
                start = line[:80].decode(errors="replace")
                yield malformed(path, number, f"expected one JSON object a line, got {shown(start)}: {e}{_hint(start)}")


def _objects_or_lines(raw: bytes, path: str, kind: str) -> Iterator[Item]:
    """Objects over several lines, which follow each other; else JSON lines, the first of which is malformed."""
    text = raw.decode()
    start = _skip_space(text, 0)
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    try:
        _, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError) as e:
        if kind == ".json":
            yield malformed(path, getattr(e, "lineno", 1), f"expected JSON: {e}{_hint(text[start : start + 80])}")
        else:
            yield from _json_lines(raw, path)
        return
    if _skip_space(text, end) == len(text):
        yield from _one_object(text, path, kind)
        return
    line, counted = 1, 0
    at = start
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            yield malformed(path, getattr(e, "lineno", line), f"expected a JSON object: {e}")
            return
        yield _row(value, path, line)
        at = _skip_space(text, end)


def _one_object(text: str, path: str, kind: str) -> Iterator[Item]:
    """The rows of a file with one JSON object: the list in it, or the object as the only row."""
    start = _skip_space(text, 0)
    line = text.count("\n", 0, start) + 1
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as e:
        yield malformed(path, getattr(e, "lineno", line), f"expected JSON: {e}")
        return
    lists = _lists_of_rows(value, kind) if isinstance(value, dict) else []
    if len(lists) == 1 and lists[0] not in OFFICIAL_LISTS:
        yield from json_objects(text, path, _place_of_value(text, start, lists[0]), closing=None)
    elif lists:
        several = f"expected one list of rows, got the lists {listed(lists)}; write each list into a file of its own"
        official = (
            f"expected rows, got the list {lists[0]} of a public corpus; give its split, and in training its task"
        )
        yield malformed(path, line, several if len(lists) > 1 else official)
    elif isinstance(value, dict) and _is_columns(value, kind):
        message = "expected rows, got columns; with pandas write them by to_json(PATH, orient='records', lines=True)"
        yield malformed(path, line, message)
    else:
        yield _row(value, path, line)


def _lists_of_rows(value: Mapping[str, JSON], kind: str) -> list[str]:
    """Keys of an object whose values are lists of objects; none if the object is a row itself."""
    if any(k in NAMED_KEYS and not isinstance(v, Mapping) for k, v in value.items()):
        return []
    lists = {k: v for k, v in value.items() if isinstance(v, list) and all(isinstance(x, dict) for x in v)}
    return [k for k, v in lists.items() if v or kind == ".json"]


def _is_columns(value: Mapping[str, JSON], kind: str) -> bool:
    """Whether an object holds a table by columns: texts by row number, as pandas writes it, or lists of texts."""
    columns = list(value.values())
    if columns and all(isinstance(c, Mapping) and "0" in c for c in columns):
        return True
    texts = [c for c in columns if isinstance(c, list) and c and all(isinstance(x, str) for x in c)]
    return kind == ".json" and bool(texts) and len(texts) == len(columns) and len({*map(len, texts)}) == 1


def _place_of_value(text: str, start: int, key: str) -> int:
    """Index of the value of a key of the object that begins at ``start``."""
    decoder = json.JSONDecoder()
    at = _skip_space(text, start + 1)
    while True:
        name, at = decoder.raw_decode(text, at)
        at = _skip_space(text, _skip_space(text, at) + 1)
        if name == key:
            return at
        at = _skip_space(text, _skip_space(text, decoder.raw_decode(text, at)[1]) + 1)


def _row(value: JSON, path: str, line: int) -> Item:
    if not isinstance(value, dict):
        return malformed(path, line, f"expected a mapping, got {type(value).__name__}")
    return FileRow(value, path, line)


def _hint(start: str) -> str:
    """Advice for a text that is not JSON, by its first characters."""
    if start.lstrip().startswith("{'"):
        return "; strings of JSON stand in double quotes, write rows with json.dumps"
    return "" if start.lstrip()[:1] in ("{", "[", '"') else "; a table with a header is named .csv or .tsv"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _unique_keys(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    """Make a JSON object, and raise `ValueError` for a repeated key, whose first value would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        msg = f"key {shown(next(k for k in keys if keys.count(k) > 1))} is given twice in one object"
        raise ValueError(msg)
    return found


def _skip_space(text: str, start: int) -> int:
    match = WHITE_SPACE.match(text, start)
    return match.end() if match else start
