"""Tables in text files: CSV with commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator, Sequence

from prefixfast.config.json_types import JSON
from prefixfast.data.files.items import FileRow, Item, json_cell, malformed
from prefixfast.data.files.json_rows import parse_json
from prefixfast.data.files.names import known_names
from prefixfast.data.files.separator import find_separator
from prefixfast.data.formats import JSON_KEYS
from prefixfast.errors import DataError, shown

logger = logging.getLogger(__name__)
MAX_FIELD = 2**31 - 1
SEPARATOR_LINE = re.compile(rb"sep=([,;\t|])\r?\n", re.IGNORECASE)  # the first line of some files for Excel
NO_NAME = re.compile(r"\s*(Unnamed: \d+)?\s*")  # name that pandas gives to a column without one
CSV_ERRORS = (  # messages of the csv module
    ("unexpected end of data", "the double quote that opens a cell here is never closed"),
    ("expected after", "a cell that begins with a double quote goes on after its closing quote"),
)


def delimited_items(raw: bytes, path: str, kind: str) -> Iterator[Item]:
    """Yield the rows of a table with their lines.

    A cell without characters is None, which counts as absent, and a record of several such cells is a blank line. Cells
    under keys of lists and mappings are read as JSON.

    Args:
        raw: Content of the file as UTF-8.
        path: Path of the file, for errors.
        kind: Suffix of the file.
    """
    if first := SEPARATOR_LINE.match(raw):
        separator = first[1].decode()
        raw = raw[: first.start()] + b"\n" + raw[first.end() :]  # lines keep their numbers
    else:
        separator = find_separator(raw, path, kind)
    table = _Table(path, separator)
    spaced = f'{separator} "'.encode() in raw
    for line, cells, text in _records(raw, path, separator, keep_text=spaced):
        if isinstance(cells, DataError):
            yield cells
            return
        if not table.names:
            if not any(map(str.strip, cells)):
                continue
            if error := table.read_header(line, cells):
                yield error
                return
        elif (item := table.row(line, cells, text)) is not None:
            yield item
            if isinstance(item, DataError) and table.is_broken:
                return


class _Table:
    """Header of a table, and the rows that its records become.

    Attributes:
        names: Name of each column, empty for a column without one.
        is_broken: Whether the header does not fit the records, so that the rest of the file is not read.
    """

    def __init__(self, path: str, separator: str) -> None:
        self.path, self.separator = path, separator
        self.names: list[str] = []
        self.is_broken = False
        self.line = 1
        self._json: list[str] = []
        self._has_index = False

    def read_header(self, line: int, cells: Sequence[str]) -> DataError | None:
        """Take the names of the columns from the first record; the error of a wrong header."""
        self.line = line
        names = ["" if NO_NAME.fullmatch(c) else c for c in cells]
        repeated = sorted({n for n in names if n and names.count(n) > 1})
        if repeated:
            message = f"expected every column once, got {shown(repeated[0])} several times"
            return malformed(self.path, line, f"{message}; if this line is a row, put a line of names before it")
        found = known_names([n for n in names if n])
        if isinstance(found, str):
            return malformed(self.path, line, found)
        self.names = [found.get(n, n) for n in names]
        self._json = [n for n in self.names if n in JSON_KEYS]
        return None

    def row(self, line: int, cells: list[str], text: str) -> Item | None:
        """Row of a record, the error of a wrong record, or None for a record of empty cells."""
        names, number = self.names, len(self.names)
        if len(cells) != number:
            if not any(map(str.strip, cells)):
                return None
            if len(cells) < number or any(cells[number:]):
                return malformed(self.path, line, self._wrong_number(len(cells)))
            cells = cells[:number]  # separators at the end of the line
        values: dict[str, JSON] = dict(zip(names, [c or None for c in cells], strict=True))
        if text and (cell := next((c for c in cells if self._is_quoted_late(c, text)), None)):
            return malformed(self.path, line, f"expected no space before a double quote, got the cell {shown(cell)}")
        if "" in values and (error := self._drop_unnamed(line, cells, values)):
            return error
        for name in self._json:
            values[name] = _json_value(values[name])
        return FileRow(values, self.path, line)

    def _wrong_number(self, got: int) -> str:
        shown_separator = shown(self.separator)
        hints = f"put a cell that contains {shown_separator} or a line break in double quotes"
        if got < len(self.names):
            hints = f"is a {shown_separator} missing, or a line break not in double quotes?"
        return f"expected {len(self.names)} cells as in the header, got {got}; {hints}"

    def _is_quoted_late(self, cell: str, text: str) -> bool:
        """Whether a cell has a space before its opening quote, which makes the quotes a part of the text."""
        return cell.startswith(' "') and cell.rstrip().endswith('"') and self.separator + cell in text

    def _drop_unnamed(self, line: int, cells: list[str], values: dict[str, JSON]) -> DataError | None:
        """Remove the columns without a name, which are empty or the row numbers that pandas writes first."""
        del values[""]
        for i, (name, cell) in enumerate(zip(self.names, cells, strict=True)):
            if name or not cell:
                continue
            if i or not cell.isdecimal():
                self.is_broken = True
                message = f"column {i + 1} has no name, but line {line} has {shown(cell)} in it; add the name"
                return malformed(self.path, self.line, message)
            if not self._has_index:
                logger.info("%s: the first column has no name and holds row numbers; it is left out", self.path)
                self._has_index = True
        return None


def _records(
    raw: bytes, path: str, separator: str, *, keep_text: bool
) -> Iterator[tuple[int, list[str] | DataError, str]]:
    """Records that are not blank: first line, cells or the error that ends the file, and text if it is kept."""
    csv.field_size_limit(MAX_FIELD)
    kept: list[str] = []
    lines: Iterator[str] = io.TextIOWrapper(io.BytesIO(raw), "utf-8", newline="")
    reader = csv.reader(_keep(lines, kept) if keep_text else lines, delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        kept.clear()
        try:
            cells = next(reader, None)
        except csv.Error as e:
            yield line, _csv_error(path, line, reader.line_num, str(e)), ""
            return
        if cells is None:
            return
        if any(cells) or len(cells) == 1:  # a cell of empty quotes is a row of a table of one column
            yield line, cells, "".join(kept)


def _keep(lines: Iterator[str], kept: list[str]) -> Iterator[str]:
    for line in lines:
        kept.append(line)
        yield line


def _csv_error(path: str, line: int, found_at: int, message: str) -> DataError:
    reason = next((text for part, text in CSV_ERRORS if part in message), f"malformed CSV: {message}")
    place = f" (found in line {found_at})" if found_at != line else ""
    return malformed(path, line, f"{reason}{place}; write a double quote inside a cell as two, and close each cell")


def _json_value(value: JSON) -> JSON:
    """List or mapping that a cell holds as JSON; other cells stay as they are, and the row's format checks them."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json_cell(value, parse_json(value))
        except (ValueError, RecursionError):
            return value
    return value
