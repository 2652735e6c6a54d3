"""A name of a column finds its column exactly, or without case and outer white space; errors name the nearest."""

from __future__ import annotations

import pytest

from prefixfast.data.column_names import column_error, matching_columns


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("price", ["name", "price", "Price"], ["price"]),
        ("price", ["name", " Price "], [" Price "]),
        ("  PRICE", ["name", "price"], ["price"]),
        ("straße", ["STRASSE"], ["STRASSE"]),
        ("price", ["\u00a0price\u00a0"], ["\u00a0price\u00a0"]),
        ("price", ["Price", "PRICE"], ["Price", "PRICE"]),
        ("price", ["prices", 7, None], []),
        ("", ["", " "], [""]),
    ],
)
def test_match(name: str, columns: list[str], found: list[str]) -> None:
    assert matching_columns(name, columns) == found


def test_errors_name_the_columns_and_the_nearest() -> None:
    columns = ["Product Name", "Price ", 7]
    message = column_error("prise", columns)
    assert "'prise'" in message
    assert "'Product Name', 'Price ', '7'" in message
    assert message.endswith("'Price '?")
    assert "'A', ' a'" in column_error("a", ["A", " a"])
    assert "empty" in column_error("a", [])
    assert len(column_error("x" * 10**6, [f"{i:0300}" for i in range(1000)])) < 10_000
