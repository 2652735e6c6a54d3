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


Item: TypeAlias = FileRow | DataError


def malformed(path: str, line: int, message: str) -> DataError:
    """Make the error of a line of a file."""
    return DataError(f"{path}:{line}: {message}", path=path, line=line)


def parse_item(parse: Callable[[FileRow], FileRow], entry: FileRow) -> Item:
    """The row that ``parse`` makes of an entry of an official file, or the `DataError` that ``parse`` raises."""
    try:
        return parse(entry)
    except DataError as e:
        return e
