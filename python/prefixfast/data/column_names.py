"""Names of columns: a name finds its column exactly, or else without regard to case and outer white space."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prefixfast.errors import MAX_SHOWN, shown

LISTED = 30  # columns that an error names


def folded(name: str) -> str:
    """Name without upper case and outer white space; names that agree in it are one name to a reader."""
    return name.strip().casefold()


def matching_columns(name: str, columns: Iterable[object]) -> list[str]:
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


def column_error(name: str, columns: Iterable[object]) -> str:
    """Error message for a name that does not find exactly one column: the columns that exist, and the nearest ones."""
    existing = [str(c) for c in columns]
    if len(found := matching_columns(name, existing)) > 1:
        return f"expected one column {shown(name)}, got {listed(found)}"
    near = nearest_columns(name, existing)
    hint = f"; did you mean {' or '.join(map(shown, near))}?" if near else ""
    return f"expected a column {shown(name)}, got the columns {listed(existing) or 'of an empty row'}{hint}"


def nearest_columns(name: str, columns: Iterable[str], *, similarity: float = 0.6) -> list[str]:
    """At most three columns whose names are most similar to a name, without regard to case and outer white space.

    Args:
        name: Name that a user gives.
        columns: Names of the columns that exist.
        similarity: Smallest ratio of equal characters, from 0 to 1.
    """
    by_folded = {folded(c): c for c in columns}
    return [
        by_folded[c]
        for c in difflib.get_close_matches(folded(name)[:MAX_SHOWN], list(by_folded), n=3, cutoff=similarity)
    ]


def listed(columns: Iterable[str]) -> str:
    """Columns in an error message."""
    names = list(columns)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(shown, names[:LISTED])) + more
