"""`FileRow`, a row that knows its place in a file, and the errors of malformed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError


class FileRow(dict[str, JSON]):
    """A row that keeps its file and line.

    Attributes:
        path: Path of the file.
        line: Line on which the row begins, counted from 1; in a ``.parquet`` file the number of the row.
    """

    __slots__ = ("line", "path")

    def __init__(self, values: Mapping[str, JSON] | Iterable[tuple[str, JSON]], path: str, line: int) -> None:
        super().__init__(values)
        self.path, self.line = path, line

    def __reduce__(self) -> tuple[object, ...]:
        return FileRow, (dict(self), self.path, self.line)


class ListCell(list[JSON]):
    """A list that a cell of a table holds as JSON.

    Attributes:
        text: Text of the cell.
    """

    __slots__ = ("text",)
    text: str


class MappingCell(dict[str, JSON]):
    """A mapping that a cell of a table holds as JSON.

    Attributes:
        text: Text of the cell.
    """

    __slots__ = ("text",)
    text: str


Item: TypeAlias = FileRow | DataError


def json_cell(text: str, value: JSON) -> JSON:
    """Value of a cell that keeps the cell's text, since a task of columns reads the text."""
    found: ListCell | MappingCell
    if isinstance(value, list):
        found = ListCell(value)
    elif isinstance(value, dict):
        found = MappingCell(value)
    else:
        return value
    found.text = text
    return found


def malformed(path: str, line: int, message: str) -> DataError:
    """Make the error of a line of a file."""
    return DataError(f"{path}:{line}: {message}", path=path, line=line)


def parse_item(parse: Callable[[FileRow], FileRow], entry: FileRow) -> Item:
    """The row that ``parse`` makes of an entry of an official file, or the `DataError` that ``parse`` raises."""
    try:
        return parse(entry)
    except DataError as e:
        return e
