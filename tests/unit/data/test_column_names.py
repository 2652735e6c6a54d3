"""A name of a column finds its column exactly, or without case and outer white space; errors name the nearest."""

from __future__ import annotations

import pytest

from prefixfast import DataError
from prefixfast.data.column_names import find_column, matching_columns


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


def test_column_of_a_row() -> None:
    row = {"Product Name": "x", "Price ": 1}
    assert find_column(row, 0, "product name") == "Product Name"
    assert find_column(row, 0, "Price ") == "Price "
    with pytest.raises(
        DataError, match=r"^row 3: .*'prise'.*'Product Name', 'Price '; did you mean 'Price '\?"
    ) as caught:
        find_column(row, 3, "prise")
    assert caught.value.line == 4
    with pytest.raises(DataError, match="expected one column of this name, got 'A', ' a'"):
        find_column({"A": 1, " a": 2}, 0, "a")
    with pytest.raises(DataError, match="got none"):
        find_column({}, 0, "a")
