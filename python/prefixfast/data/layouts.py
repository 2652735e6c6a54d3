"""Rows of public data sets, such as Alpaca and ShareGPT, whose keys the formats read as their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prefixfast.data.formats import FORMATS, INPUT_KEYS, LAYOUTS, REQUEST_KEYS, FormatName, Layout
from prefixfast.data.row_values import check_text, only_key, text_value
from prefixfast.data.rows import Row, row_error


def layout_of(row: Row, row_format: FormatName) -> Layout | None:
    """Layout by which a task of a format reads a row; None if the row has an input key of the format, or no layout."""
    if any(row.get(key) is not None for key in FORMATS[row_format].inputs):
        return None
    return _only_layout(row, [one for one in LAYOUTS.values() if one.format == row_format])


def recognized_layout(row: Row) -> Layout | None:
    """Layout that shows the task of a row; None if the row has the input key of a format, or several layouts."""
    if any(row.get(key) is not None for key in (*INPUT_KEYS, "input_ids")):
        return None
    return _only_layout(row, list(LAYOUTS.values()))


def complete_layout(row: Row) -> Layout | None:
    """Layout of which a row has input and target, whatever other keys it has; None if there is none, or several."""
    found = _only_layout(row, list(LAYOUTS.values()))
    return found if found is not None and any(row.get(key) is not None for key in found.targets) else None


def _only_layout(row: Row, layouts: Sequence[Layout]) -> Layout | None:
    found = [one for one in layouts if row.get(one.key) is not None]
    apart = [one for one in found if not any(one.key in other.parts for other in found if other is not one)]
    return apart[0] if len(apart) == 1 else None


def request_layout(row: Row, row_format: FormatName) -> Layout | None:
    """Layout by which a request is read: one of its prefix's format, else the one that shows the task; or None.

    A public data set may hold the whole text of each row under ``text`` too. The prefix tells what is read.

    Args:
        row: Row.
        row_format: Format of the task of the prefix.
    """
    own = layout_of(row, row_format)
    others = {key for key in (*INPUT_KEYS, "input_ids") if row.get(key) is not None}
    return own if own is not None and others <= {"text"} else recognized_layout(row)


def request_layout_keys(row: Row, row_format: FormatName) -> frozenset[str]:
    """Keys that the layout of a request gives a meaning; empty for a row without a layout."""
    layout = request_layout(row, row_format)
    return frozenset() if layout is None else frozenset((*layout.parts, *layout.targets))


def layout_keys(row: Row, row_format: FormatName) -> frozenset[str]:
    """Keys that the layout of a row gives a meaning; empty for a row without a layout."""
    layout = layout_of(row, row_format)
    return frozenset() if layout is None else frozenset((*layout.parts, *layout.targets))


def layout_targets(row: Row, row_format: FormatName) -> tuple[str, ...]:
    """Keys for the target in the layout of a row; empty for a row without a layout."""
    layout = layout_of(row, row_format)
    return () if layout is None else layout.targets


def input_key(row: Row, number: int, row_format: FormatName) -> str:
    """Key of the row's input in a format or one of its layouts.

    Raises:
        DataError: If the row has no such key, or several.
    """
    if (layout := layout_of(row, row_format)) is not None:
        return layout.key
    inputs = FORMATS[row_format].inputs
    more = [one.key for one in LAYOUTS.values() if one.format == row_format and not inputs]
    return only_key(row, number, (*inputs, *more))


def input_text(row: Row, number: int, key: str) -> str:
    """Text of the input under a key, joined from all parts if the key shows a layout.

    Raises:
        DataError: If a value is not a string.
    """
    if key not in LAYOUTS:
        return text_value(row, number, key)
    parts = [(k, row.get(k)) for k in LAYOUTS[key].parts if k == key or row.get(k) not in (None, "")]
    return "\n\n".join(check_text(row, number, k, value) for k, value in parts)


def target_text(row: Row, number: int, row_format: FormatName) -> str:
    """Text of the row's target.

    Raises:
        DataError: If the target is missing or not a string, or the row has several targets of its layout.
    """
    if (layout := layout_of(row, row_format)) is not None:
        hint = "" if any(k in row for k in layout.targets) else _other_target(layout.key, row)
        return text_value(row, number, only_key(row, number, layout.targets, hint))
    keys = FORMATS[row_format].targets
    if not any(k in row for k in keys):
        key = input_key(row, number, row_format)
        raise row_error(row, number, f"{keys[0]}: expected a string, got None{_other_target(key, row)}")
    return text_value(row, number, next((k for k in keys if row.get(k) is not None), keys[0]))


def _other_target(key: str, row: Row) -> str:
    """Advice for a row whose target has another key."""
    others = ", ".join(sorted(str(k) for k in row if k != key and k not in REQUEST_KEYS))
    if not others:
        return ""
    return f" (for a target in one of {others}, give prompt '{{{key}}}\\n' and target, with --prompt and --target)"


def layout_note(rows: Iterable[Row], row_format: FormatName) -> str | None:
    """Sentence on the columns by which rows of a layout are read; None for rows without one."""
    row = next(iter(rows), {})
    if (layout := layout_of(row, row_format)) is None:
        return None
    inputs = " and ".join(k for k in layout.parts if k in row)
    target = next((k for k in layout.targets if row.get(k) is not None), None)
    read = f"rows are read as {layout.task} rows: the input is {inputs}"
    read += f", the target is {target}" if target else ""
    left = sorted(str(k) for k in row if k not in (*layout.parts, *layout.targets))
    return read + (f"; other columns: {', '.join(left)}" if left else "")
