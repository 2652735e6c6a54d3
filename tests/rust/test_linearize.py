"""Tables to text against independent twins, on real and on made-up tables."""

import json
from collections import UserDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import E2E_KEYS, SHARED, e2e, e2e_rows, template
from prefixfast._rust import Linearizer
from prefixfast.errors import ConfigError, DataError

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
TABLES = st.lists(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), max_size=4)


def test_e2e_on_all_real_rows() -> None:
    if not (SHARED / "data" / "e2e").is_dir():
        pytest.skip(f"the E2E data is not at {SHARED}")
    rows = list(e2e_rows())
    assert len(rows) > 47_000
    texts = Linearizer.e2e().linearize(rows)
    assert texts == [e2e(row) for row in rows]
    assert Linearizer.e2e().linearize(["name[Alimentum], area[city centre], familyFriendly[no]"]) == [
        "name : Alimentum | area : city centre | family friendly : no"
    ]


@given(st.dictionaries(st.sampled_from(list(E2E_KEYS)), st.text("ab ,£-'1é", min_size=1).filter(str.strip), min_size=1))
@settings(derandomize=True, deadline=None)
def test_e2e_forms_agree(table: dict[str, str]) -> None:
    table.pop("priceRange", None)
    if not table:
        return
    text = ", ".join(f"{key}[{value}]" for key, value in table.items())
    expected = e2e(table)
    assert Linearizer.e2e().linearize([text, table, list(table.items()), UserDict(table)]) == [expected] * 4


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        ("less than £20", "less than £ 20"),
        ("£20-25", "£ 20 - 25"),
        ("£ 20 - 25", "£ 20 - 25"),
        ("more than £30", "more than £ 30"),
        ("cheap", "cheap"),
        ("low-cost", "low-cost"),
    ],
)
def test_e2e_prices(price: str, expected: str) -> None:
    assert Linearizer.e2e().linearize([{"priceRange": price}]) == [f"price : {expected}"]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("", "empty"),
        ({}, "empty"),
        ([], "empty"),
        ("name[a], colour[red]", "colour"),
        ("name[a], name[b]", "twice"),
        ([("name", "a"), ("name", "b")], "twice"),
        ("name[]", "is empty"),
        ({"name": "  "}, "is empty"),
        ("name[a", "character 4"),
        ("é, name[a]]", "not known"),
        ("name[a]]", "character 7"),
        ("name[a] food[b]", "character 8"),
        ({"name": 3}, "name"),
        ({3: "a"}, "int"),
        ([("name",)], "tuple"),
        (["ab"], "str"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_e2e_names_row_and_cause(row: object, part: str) -> None:
    with pytest.raises(DataError, match="row 1") as caught:
        Linearizer.e2e().linearize(["name[a]", row])
    assert part in str(caught.value)
    assert (caught.value.path, caught.value.line) == (None, None)


@given(TABLES, TEXT, TEXT, TEXT, st.sampled_from(["{key} : {value}", "{{{key}}}={value}", "{value}{key}{value}", "é{key}{{}}{value}"]))
@settings(derandomize=True, deadline=None)
def test_template(tables: list[list[tuple[str, str]]], separator: str, start: str, end: str, item: str) -> None:
    linearizer = Linearizer.template(item=item, separator=separator, start=start, end=end)
    expected = [template(table, item, separator, start, end) for table in tables]
    assert linearizer.linearize(tables) == expected
    again = Linearizer.from_spec(linearizer.spec)
    assert again.linearize(tables) == expected
    assert again.spec == linearizer.spec


def test_template_takes_mappings_and_keeps_order() -> None:
    assert Linearizer.template().linearize([{"b": "1", "a": "2"}, [("a", "1"), ("a", "2")]]) == ["b : 1 | a : 2", "a : 1 | a : 2"]


@pytest.mark.parametrize("row", ["a : b", {}, {"a": 1}, {"a": None}, [("a", "b", "c")], [["a"]], 7])
def test_template_refuses(row: object) -> None:
    with pytest.raises(DataError, match="row 0"):
        Linearizer.template().linearize([row])


@pytest.mark.parametrize("item", ["", "{key}", "{value}", "{key}{value}{", "{key}{value}}", "{key}{value}{x}", "{key!r}{value}", "{}{key}{value}"])
def test_template_refuses_item(item: str) -> None:
    with pytest.raises(ConfigError, match="template item"):
        Linearizer.template(item=item)


def test_spec() -> None:
    assert json.loads(Linearizer.e2e().spec) == {"style": "e2e"}
    assert json.loads(Linearizer.template().spec) == {"style": "template", "item": "{key} : {value}", "separator": " | ", "start": "", "end": ""}
    assert Linearizer.from_spec('{"style": "template"}').spec == Linearizer.template().spec
    for wrong in [
        "",
        "[]",
        "null",
        "{}",
        '{"style": 3}',
        '{"style": "x"}',
        '{"style": "e2e", "item": ""}',
        '{"style": "template", "itme": ""}',
        '{"style": "template", "end": 1}',
        "[" * 100_000,
    ]:
        with pytest.raises(ConfigError):
            Linearizer.from_spec(wrong)


def test_surrogates_are_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        Linearizer.template().linearize([{"a": "\ud800"}])
