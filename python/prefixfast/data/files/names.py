"""Names of columns in files, read as the keys that have a meaning without regard to case and outer white space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefixfast.data.column_names import folded
from prefixfast.data.files.items import FileRow, Item, malformed
from prefixfast.data.formats import NAMED_KEYS
from prefixfast.errors import shown


def known_names(names: Sequence[str]) -> dict[str, str] | str:
    """Keys that names of columns mean, or an error message.

    Args:
        names: Names of all columns.

    Returns:
        Key by name, for names that differ from a key in case or outer white space. Where a key itself is a name, it
        keeps its meaning alone. The error message names two columns that would become one key.

    Example:
        >>> known_names([" Prompt ", "Completion", "Note"])
        {' Prompt ': 'prompt', 'Completion': 'completion'}
    """
    found: dict[str, str] = {}  # name by key
    exact = NAMED_KEYS.intersection(names)
    for name in names:
        key = folded(name)
        if key not in NAMED_KEYS or key in exact:
            continue
        if key in found:
            return f"the columns {shown(found[key])} and {shown(name)} are both read as {key}; rename one of them"
        found[key] = name
    return {name: key for key, name in found.items()}


def renaming() -> Callable[[Item], Item]:
    """Function that gives the keys of a file's rows their known names; rows of equal keys are looked up once."""
    by_names: dict[tuple[str, ...], dict[str, str] | str] = {}

    def rename(item: Item) -> Item:
        if not isinstance(item, FileRow):
            return item
        names = tuple(item)
        if names not in by_names:
            by_names[names] = known_names(names)
        found = by_names[names]
        if isinstance(found, str):
            return malformed(item.path, item.line, found)
        return FileRow(((found.get(k, k), v) for k, v in item.items()), item.path, item.line) if found else item

    return rename
