"""Reader of the outputs of any system."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from prefixfast.data.files import file_items
from prefixfast.data.row_values import check_text, only_key, text_value
from prefixfast.data.rows import Row, is_table_row, row_error
from prefixfast.errors import DataError, shown
from prefixfast.io.paths import as_path
from prefixfast.metrics.text_files import (
    is_text_file,
    item_rows,
    listed_values,
    row_errors,
    row_place,
    text_file_lines,
)

OUTPUT_KEYS = ("text", "output", "prediction", "hypothesis")  # of rows, which have one of them


class Output(NamedTuple):
    """An output with its place, and the other columns of its row (empty without one)."""

    text: str
    place: str
    row: Row


def read_outputs(outputs: Any) -> list[Output]:
    """Outputs of any system.

    Args:
        outputs: Path of a file of rows, or of one text a line; or an iterable of texts, of rows, or of objects with
            the text under ``text``, such as `Generation`.

    Raises:
        ConfigError: If the argument is none of these.
        DataError: If a file or row is malformed, or its request failed, with the place.
    """
    if isinstance(outputs, str | os.PathLike):
        path = as_path("outputs", outputs)
        if is_text_file(path):
            return [Output(line, f"{path}:{i}", {}) for i, line in enumerate(text_file_lines(path, OUTPUT_KEYS), 1)]
        return [_row_output(row, i) for i, row in enumerate(item_rows(file_items(path)))]
    return [_output(value, i) for i, value in enumerate(listed_values("outputs", outputs))]


def _output(value: Any, number: int) -> Output:
    place = f"outputs: text {number}"
    if isinstance(value, Mapping):
        return _row_output(value, number)
    if isinstance(value, str):
        with row_errors("outputs", {}):
            return Output(check_text({}, number, "text", value), place, {})
    if isinstance(getattr(value, "text", None), str):  # a Generation; its class would import the engine
        row = {"text": value.text, "id": getattr(value, "id", None), "error": getattr(value, "error", None)}
        return _row_output(row, number)
    msg = f"{place}: expected a string, a row or a Generation, got {shown(value)}"
    raise DataError(msg)


def _row_output(row: Row, number: int) -> Output:
    with row_errors("outputs", row):
        if row.get("error") is not None:
            raise row_error(row, number, f"expected a text, got the error of a failed request, {shown(row['error'])}")
        return Output(_output_text(row, number), row_place(row, "outputs", number), row)


def _output_text(row: Row, number: int) -> str:
    texts = [row[key] for key in OUTPUT_KEYS if row.get(key) is not None]
    if not texts and (key := next((key for key in OUTPUT_KEYS if key in row), None)):
        return "" if is_table_row(row) else text_value(row, number, key)  # a table has None in an empty cell
    if len(texts) > 1 and all(text == texts[0] for text in texts):
        key = next(key for key in OUTPUT_KEYS if row.get(key) is not None)
    else:
        key = only_key(row, number, OUTPUT_KEYS)
    return check_text(row, number, key, row[key])
