"""Checks of the values under the keys of a row."""

from __future__ import annotations

from collections.abc import Sequence

from prefixfast.config.json_types import JSON
from prefixfast.data.formats import FORMATS, FormatName
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import shown


def only_key(row: Row, number: int, keys: Sequence[str], hint: str = "") -> str:
    """The one key of ``keys`` that the row has.

    A value of None counts as absent, since a table of mixed rows holds None in the columns that a row does not use.

    Args:
        row: Row.
        number: Number of the row, for errors.
        keys: Possible keys.
        hint: Text after the possible keys in the error's message.

    Raises:
        DataError: If the row has none of the keys, or several.
    """
    found = [k for k in keys if row.get(k) is not None]
    if len(found) != 1:
        got = f"{' and '.join(found)}; remove all but one" if found else f"the keys {sorted(map(str, row))}"
        msg = f"expected one of the keys {', '.join(keys)}{hint}, got {got}"
        raise row_error(row, number, msg)
    return found[0]


def text_value(row: Row, number: int, key: str) -> str:
    """The string under a key of the row.

    Raises:
        DataError: If the string is missing, not a string, or not Unicode text.
    """
    if key in row and row[key] is None:
        raise row_error(row, number, f"{key}: expected a string, got None (no value); fill it in or leave the row out")
    return check_text(row, number, key, row.get(key))


def check_text(row: Row, number: int, key: str, value: JSON) -> str:
    """Return ``value`` if it is a string that UTF-8 can hold.

    Raises:
        DataError: If ``value`` is not such a string.
    """
    if not isinstance(value, str):
        msg = f"{key}: expected a string, got {shown(value)}; the row has {sorted(map(str, row))}"
        raise row_error(row, number, msg)
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as e:
        msg = f"{key}: expected Unicode text, got half a surrogate pair at character {e.start}"
        raise row_error(row, number, msg) from e
    return value


def json_hint(value: object) -> str:
    """Advice for a text that looks like a list or mapping and is no JSON, as pandas writes one into a cell."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return ""
    return "; a list or mapping in a cell is JSON, with double quotes: write it there with json.dumps"


def references(row: Row, number: int, row_format: FormatName = "table") -> list[str]:
    """References of a row, from its only target (a string) or ``refs`` (a list of strings).

    Args:
        row: Row.
        number: Number of the row, for errors.
        row_format: Format with the key ``refs``, ``"table"`` or ``"document"``.

    Raises:
        DataError: If the row has no references.
    """
    if (key := only_key(row, number, FORMATS[row_format].targets)) != "refs":
        return [text_value(row, number, key)]
    refs = row["refs"]
    if not isinstance(refs, Sequence) or isinstance(refs, str) or not refs:
        msg = f"refs: expected a list of strings, got {shown(refs)}{json_hint(refs)}"
        raise row_error(row, number, msg)
    return [check_text(row, number, f"refs[{i}]", r) for i, r in enumerate(refs)]
