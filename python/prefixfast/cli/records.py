"""`Records`, the lines of an output file: the columns of each input row, and the fields of its result beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixfast.engine.request import Generation
    from prefixfast.engine.score import Score

RENAMED = "input_"  # start of the name of a column that a field of the result would replace
GENERATION_DETAILS = ("index", "token_ids", "finish_reason", "score", "prefix_digest", "usage")
SCORE_DETAILS = ("index", "token_logprobs", "token_ids", "prefix_digest", "usage")


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of the results of a command.

    Attributes:
        main: Field that a file of plain text holds.
        shown: Fields that every record has, ``main`` first.
        optional: Fields that a record has if its result has a value for them.
        details: Further fields of ``--details``.
    """

    main: str
    shown: tuple[str, ...]
    optional: tuple[str, ...] = ()
    details: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All fields."""
        return (*self.shown, *self.optional, *self.details)


def generated(*, logprobs: bool, errors: bool, details: bool) -> Fields:
    """Fields of `generate`.

    Args:
        logprobs: Whether log-probabilities were asked for.
        errors: Whether errors of single requests are results.
        details: Whether all fields are written.
    """
    asked = {"logprobs": logprobs or details, "error": errors or details}
    shown = ("text", *(name for name, wanted in asked.items() if wanted))
    return Fields("text", shown, ("texts", "base_mismatch"), GENERATION_DETAILS if details else ())


def scored(*, details: bool) -> Fields:
    """Fields of `score`.

    Args:
        details: Whether all fields are written.
    """
    return Fields(
        "logprob", ("logprob", "num_tokens", "is_greedy"), ("base_mismatch",), SCORE_DETAILS if details else ()
    )


def result_values(result: Generation | Score) -> dict[str, Any]:
    """Values of a result by field, without optional fields that it does not have; ``num_tokens`` for a score."""
    values = dataclasses.asdict(result)
    if len(values.get("texts", ())) < 2:
        values.pop("texts", None)
    if values.get("base_mismatch") is None:
        values.pop("base_mismatch", None)
    if "token_logprobs" in values:
        values["num_tokens"] = len(values["token_ids"])
    return values


class Records:
    """Maker of records.

    Args:
        rows: Rows of the input.
        fields: Fields of the results.

    Attributes:
        renamed: New names of the columns whose names are those of fields.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], fields: Fields) -> None:
        self.rows, self.fields = rows, fields
        self.columns = list(dict.fromkeys(str(column) for row in rows for column in row))
        self.renamed: dict[str, str] = {}
        taken = {*self.columns, *fields.names}
        for column in self.columns:
            if is_field(column, fields):
                name = RENAMED + column
                while name in taken:
                    name = RENAMED + name
                taken.add(name)
                self.renamed[column] = name

    def record(self, result: Generation | Score) -> dict[str, Any]:
        """Record of a result."""
        values = result_values(result)
        columns = {self.renamed.get(str(k), str(k)): value for k, value in self.rows[result.index].items()}
        return columns | {name: values.get(name) for name in self.fields.names if self._has(name, values)}

    def _has(self, name: str, values: Mapping[str, Any]) -> bool:
        return name in values or name not in self.fields.optional

    def header(self, records: Iterable[Mapping[str, Any]]) -> list[str]:
        """Names of all values of records: the columns of the input, then the fields of the results."""
        met = {name for record in records for name in record}
        columns = (self.renamed.get(column, column) for column in self.columns)
        return [*columns, *(name for name in self.fields.names if name in met)]


def is_field(column: str, fields: Fields) -> bool:
    """Whether a column has the name of a field, or that of a further text in a table (``text_2``)."""
    start, _, number = column.rpartition("_")
    return column in fields.names or ("texts" in fields.names and start == fields.main and number.isdecimal())
