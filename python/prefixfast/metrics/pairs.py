"""Checks that outputs and references belong together, and the tables of their rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefixfast.config.json_types import JSON
from prefixfast.data.formats import FORMATS
from prefixfast.data.rows import Row
from prefixfast.errors import DataError, shown
from prefixfast.metrics.outputs import Output
from prefixfast.metrics.references import Reference

TABLE_KEYS = FORMATS["table"].inputs
COMPARED_KEYS = ("id", *TABLE_KEYS, "document", "article", "dialogue")


def check_pairs(outputs: Sequence[Output], references: Sequence[Reference]) -> None:
    """Check that outputs and references are those of the same inputs, in the same order.

    Raises:
        DataError: If there are none, if their numbers differ, or if the id or the input of a pair differs.
    """
    if len(outputs) != len(references) or not outputs:
        got = f"{len(outputs)} outputs{_source(outputs)} and {len(references)} groups{_source(references)}"
        msg = f"expected one group of references for each output, got {got}; each input has one output, and all its "
        msg += "references are one group"
        raise DataError(msg)
    for output, reference in zip(outputs, references, strict=True):
        for key in COMPARED_KEYS:
            ours, theirs = output.row.get(key), reference.row.get(key)
            if ours is not None and theirs is not None and not _same(ours, theirs):
                msg = f"{output.place}: expected the {key} of the references at {reference.place}, {shown(theirs)}, "
                msg += f"got {shown(ours)}; outputs and references are matched by position, so bring them in one order"
                raise DataError(msg)


def tables_of(rows: Iterable[Row]) -> list[Row] | None:
    """The rows if each holds a table, None otherwise."""
    found = list(rows)
    return found if all(any(row.get(key) is not None for key in TABLE_KEYS) for row in found) else None


def _source(found: Sequence[Output] | Sequence[Reference]) -> str:
    """Name of the file of outputs or references, empty for others."""
    path = found[0].place.rpartition(":")[0] if found else ""
    return f" in {path}" if path not in ("", "outputs", "references") else ""


def _same(ours: JSON, theirs: JSON) -> bool:
    """Whether two values are equal but for white space, and for the type of a number in a cell of a table."""
    return _as_text(ours).split() == _as_text(theirs).split()


def _as_text(value: Any) -> str:
    """A value as `generate` writes it into a table; columns of Parquet files also have dates, and values of numpy."""
    value = _plain(value)
    if not isinstance(value, bool | int | float | Mapping | Sequence) or isinstance(value, str):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _plain(value: Any) -> Any:
    """A value of numpy, a scalar or an array, as one of Python; any other value that JSON lacks as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | Mapping | Sequence) else str(value)
