"""Texts of a user's own columns: templates such as ``"{name}, {price} ->"``, and the entries of a table."""

from __future__ import annotations

import datetime
import decimal
import functools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence

from prefixfast.data.column_names import column_error, matching_columns, nearest_columns
from prefixfast.data.files import ListCell, MappingCell
from prefixfast.data.row_values import check_text
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import ConfigError, shown

PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
MISSPELT = 0.8  # similarity from which an unread column counts as a misspelt one of the table


@functools.lru_cache(256)
def parse_template(template: str) -> tuple[str, ...]:
    """Split a template into texts and names in turn.

    Args:
        template: Template. ``{column}`` stands for a column's value, ``{{`` and ``}}`` for braces.

    Returns:
        A text, a name, a text, and so on; names have the odd indices, the last part is a text. Texts can be empty.

    Raises:
        ConfigError: If a brace has no partner, or a name is empty.

    Example:
        >>> parse_template("{name}: {{{price} ->")
        ('', 'name', ': {', 'price', ' ->')
    """
    parts, text, start = [], "", 0
    for match in PIECE.finditer(template):
        text += template[start : match.start()]
        start = match.end()
        if match[0] in ("{{", "}}"):
            text += match[0][0]
        elif match[1] is None or not match[1].strip():
            got = "braces without a name" if match[1] is not None else f"a lone {match[0]}"
            msg = f"expected columns in braces ({{{{ and }}}} stand for braces), got {got} in {shown(template)}"
            raise ConfigError(msg)
        else:
            parts += [text, match[1].strip()]
            text = ""
    return (*parts, text + template[start:])


def template_columns(template: str) -> tuple[str, ...]:
    """Columns that a template names, each once."""
    return tuple(dict.fromkeys(parse_template(template)[1::2]))


@functools.lru_cache(4096)
def find_columns(names: tuple[str, ...], keys: tuple[object, ...]) -> tuple[str | None, ...]:
    """Keys of a row that the names of columns mean, None for a name that does not mean exactly one.

    Args:
        names: Names of columns.
        keys: Keys of the row.
    """
    found = (matching_columns(name, keys) for name in names)
    return tuple(keys[0] if len(keys) == 1 else None for keys in found)


def fill_template(template: str, row: Row, number: int, field: str) -> str:
    """Text of a row by a template. Braces in a value are text.

    Args:
        template: Template.
        row: Row.
        number: Number of the row, for errors.
        field: Field of the template, for errors.

    Raises:
        DataError: If a column is missing, or has no value or one that has no text.
    """
    parts = parse_template(template)
    keys = find_columns(parts[1::2], tuple(row))
    out = [parts[0]]
    for name, key, text in zip(parts[1::2], keys, parts[2::2], strict=True):
        if key is None:
            raise row_error(row, number, f"{field}: {column_error(name, row)}")
        value = cell_text(row, number, key)
        if value is None:
            advice = "fill it in or leave the row out"
            advice += ", or use table, which leaves out missing values" if field == "prompt" else ""
            raise row_error(row, number, f"{field}: expected a value in column {shown(key)}, got none; {advice}")
        out += [value, text]
    return "".join(out)


def table_entries(columns: tuple[str, ...], row: Row, number: int) -> list[tuple[str, str]]:
    """Columns of a row as entries of a table. Missing and empty values are left out.

    Args:
        columns: Names of the columns in the order of the entries, which have these names.
        row: Row.
        number: Number of the row, for errors.

    Returns:
        Name and text of each entry, at least one.

    Raises:
        DataError: If the row has a misspelt column or no entry, or a value has no text.
    """
    entries = []
    for name, key in zip(columns, find_columns(columns, tuple(row)), strict=True):
        if key is not None:
            text = cell_text(row, number, key)
            entries += [(name, text)] if text is not None and text.strip() else []
        elif _is_misspelt(name, columns, tuple(row)):
            advice = "give the column null where it has no value"
            raise row_error(row, number, f"table: {column_error(name, row)}; {advice}")
    if not entries:
        names = ", ".join(map(shown, columns))
        msg = f"table: expected a value in at least one of the columns {names}, got none; leave the row out"
        raise row_error(row, number, msg)
    return entries


@functools.lru_cache(4096)
def _is_misspelt(name: str, columns: tuple[str, ...], keys: tuple[object, ...]) -> bool:
    """Whether a row without a column has several of this name, or an unread one with a similar name."""
    read = find_columns(columns, keys)
    unread = [k for k in keys if isinstance(k, str) and k not in read]
    return bool(matching_columns(name, keys) or nearest_columns(name, unread, similarity=MISSPELT))


def cell_text(row: Row, number: int, key: str) -> str | None:
    """Text of a value.

    A string is its own text, as is a cell of a table. A number and a boolean are written as in JSON (``12``, ``0.5``,
    ``true``), a decimal number with its digits, a date in ISO form, and a list or mapping as JSON on one line.

    Args:
        row: Row.
        number: Number of the row, for errors.
        key: Key of the row.

    Returns:
        Text; None for a missing value, which is None or not a number (NaN).

    Raises:
        DataError: If the value has no text.
    """
    value: object = row[key]
    if isinstance(value, str | ListCell | MappingCell):
        return check_text(row, number, key, value if isinstance(value, str) else value.text)
    numpy = sys.modules.get("numpy")  # a number of numpy comes from an imported numpy
    if numpy is not None and isinstance(value, numpy.floating):
        value = float(str(value))  # the digits of its own precision
    elif callable(convert := getattr(value, "tolist", None)):  # a number or an array of numpy
        value = convert()
    is_nan = isinstance(value, float | decimal.Decimal) and math.isnan(value)
    if value is None or is_nan or type(value).__name__ in ("NAType", "NaTType"):  # the missing values of pandas
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return format(value, "f")
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if is_number or (isinstance(value, Mapping | Sequence) and not isinstance(value, bytes | bytearray)):
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
        except (TypeError, ValueError, RecursionError) as e:
            raise row_error(row, number, f"{key}: expected a value that JSON can hold, got {shown(value)}: {e}") from e
        return check_text(row, number, key, text)
    expected = "text, a finite number, true or false, a date, a list or a mapping"
    raise row_error(row, number, f"{key}: expected {expected}, got {shown(value)}")


def _plain(value: object) -> object:
    """Mapping or sequence of another type as a dictionary or list, for JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return list(value)
    msg = f"{type(value).__name__} has no JSON form"
    raise TypeError(msg)
