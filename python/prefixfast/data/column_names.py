"""Names of columns: a name finds its column exactly, or else without regard to case and outer white space."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prefixfast.data.rows import Row, row_error
from prefixfast.errors import MAX_SHOWN, shown

LISTED = 30  # columns that an error names


def folded(name: str) -> str:
    """Name without upper case and outer white space; names that agree in it are one name to a reader."""
    return name.strip().casefold()


def matching_columns(name: str, columns: Iterable[str]) -> list[str]:
    """Columns that a name can mean.

    Args:
        name: Name that a user gives.
        columns: Names of the columns that exist.

    Returns:
        The column of exactly this name if it exists, else all columns that differ from it only in case and outer white
        space.

    Example:
        >>> matching_columns("price", ["Name", " Price "]), matching_columns("Name", ["Name", "name"])
        ([' Price '], ['Name'])
    """
    existing = [c for c in columns if isinstance(c, str)]
    return [name] if name in existing else [c for c in existing if folded(c) == folded(name)]


def find_column(row: Row, number: int, name: str, use: str = "column") -> str:
    """Key of the row that a name means.

    Args:
        row: Row.
        number: Number of the row, for errors.
        name: Name of the column, as a user gives it.
        use: Use of the column, for errors.

    Raises:
        DataError: If the row has no such column, with the nearest one and those that exist, or several.
    """
    if name in row:
        return name
    found = matching_columns(name, row)
    if len(found) == 1:
        return found[0]
    if found:
        raise row_error(row, number, f"{use} {shown(name)}: expected one column of this name, got {listed(found)}")
    hint = f"; {near}" if (near := nearest_column(name, row)) else ""
    columns = listed(map(str, row)) if row else "none"
    raise row_error(row, number, f"{use} {shown(name)}: expected a column of this name, got {columns}{hint}")


def nearest_column(name: str, columns: Iterable[object]) -> str:
    """Question that names the columns most similar to an unknown one without regard to case, empty if none is."""
    by_folded = {folded(str(c)): str(c) for c in columns}
    close = difflib.get_close_matches(folded(name)[:MAX_SHOWN], list(by_folded), n=3)
    return f"did you mean {' or '.join(shown(by_folded[c]) for c in close)}?" if close else ""


def listed(columns: Iterable[str]) -> str:
    """Columns in an error message."""
    names = list(columns)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(shown, names[:LISTED])) + more
