"""The formats of output files: JSON lines, CSV and plain text, each also compressed."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixfast.cli.records import Records
from prefixfast.data.files import ListCell, MappingCell
from prefixfast.errors import ConfigError, shown
from prefixfast.io.json_lines import json_bytes

Record = Mapping[str, Any]
FORMULA_STARTS = ("=", "+", "-", "@")  # first characters of a cell that spreadsheets read as a formula
# Every character at which a program may end a line; the E2E script reads files by lines of `str.splitlines`.
LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


def record_line(record: Record) -> bytes:
    """One record as a JSON line; values that JSON does not have, such as dates, are written as text."""
    return json_bytes(record, default=str) + b"\n"


def one_line(text: str) -> str:
    r"""A text as one line, with a space in the place of each line break, as official scorers read texts.

    Example:
        >>> one_line('a "b"\r\nc\\n')
        'a "b" c\\n'
    """
    return _encodable(LINE_BREAK.sub(" ", text))


def _encodable(text: str) -> str:
    """The text with an escape for half a surrogate pair, which no encoding has."""
    return text.encode("utf8", "backslashreplace").decode()


def _jsonl(makes: Records, records: Sequence[Record]) -> bytes:
    return b"".join(map(record_line, records))


def _csv(makes: Records, records: Sequence[Record]) -> bytes:
    """A table with a header. Several texts of a row are the columns ``text``, ``text_2`` and so on."""
    main, out = makes.fields.main, io.StringIO(newline="")
    numbered = [f"{main}_{i}" for i in range(2, 1 + max((len(r.get("texts", ())) for r in records), default=0))]
    header = [n for name in makes.header(records) for n in (numbered if name == "texts" else [name])]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_encodable, header))
    for record in records:
        further = dict(zip(numbered, record.get("texts", ())[1:], strict=False))
        writer.writerow(_cell((record | further).get(name)) for name in header)  # type: ignore[operator]
    return out.getvalue().encode()


def _cell(value: Any) -> str:
    """Text and cells of the input as they are, nothing for None, and JSON for other values."""
    if isinstance(value, ListCell | MappingCell):
        return _encodable(value.text)
    if value is None or isinstance(value, str):
        return _encodable(value or "")
    return json_bytes(value, default=str).decode()


def _txt(makes: Records, records: Sequence[Record]) -> bytes:
    """The texts alone, one on a line, for official scorers. Every row has as many lines as the row with most texts."""
    texts = [record.get("texts", [record[makes.fields.main]]) for record in records]
    count = max(map(len, texts), default=1)
    lines = (own[i] if i < len(own) else "" for own in texts for i in range(count))
    return "".join(f"{one_line(line if isinstance(line, str) else str(line))}\n" for line in lines).encode()


WRITERS: dict[str, Callable[[Records, Sequence[Record]], bytes]] = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}
FORMATS = "JSON lines (.jsonl), a table (.csv) or the texts or log-probabilities alone (.txt), each also with .gz"


def format_of(path: Path) -> str:
    """Suffix of an output file without ``.gz``, a key of `WRITERS`.

    Raises:
        ConfigError: If the suffix is unknown.
    """
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) == 2 else (suffixes or [""])[-1]
    if kind not in WRITERS:
        msg = f"--output: expected a file ending in {', '.join(WRITERS)} (also with .gz), or - for standard output"
        msg += f", got {shown(str(path))}"
        raise ConfigError(msg)
    return kind


def file_content(path: Path, makes: Records, records: Sequence[Record]) -> bytes:
    """Content of an output file.

    Args:
        path: Path of the file, whose suffix chooses the format.
        makes: Maker of the records.
        records: All records in the order of the rows.
    """
    content = WRITERS[format_of(path)](makes, records)
    return gzip.compress(content, mtime=0) if path.suffix.lower() == ".gz" else content


def left_out(path: Path, makes: Records, records: Sequence[Record]) -> list[str]:
    """Names of the values of records that the format of a file cannot hold.

    Args:
        path: Path of the file.
        makes: Maker of the records.
        records: All records.
    """
    if format_of(path) != ".txt":
        return []
    columns = ["the columns of the input"] if makes.columns else []
    fields = makes.header(records)[len(makes.columns) :]
    return [*columns, *(n for n in fields if n not in (makes.fields.main, "texts"))]
