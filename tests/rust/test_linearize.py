"""Linearization of tables against independent implementations, on real and on random tables."""

import gzip
import json
import sys
from collections import UserDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import E2E_KEYS, SHARED, e2e, e2e_rows, gpt2, template
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


@given(
    TABLES,
    TEXT,
    TEXT,
    TEXT,
    st.sampled_from(["{key} : {value}", "{{{key}}}={value}", "{value}{key}{value}", "é{key}{{}}{value}"]),
)
@settings(derandomize=True, deadline=None)
def test_template(tables: list[list[tuple[str, str]]], separator: str, start: str, end: str, item: str) -> None:
    linearizer = Linearizer.template(item=item, separator=separator, start=start, end=end)
    expected = [template(table, item, separator, start, end) for table in tables]
    assert linearizer.linearize(tables) == expected
    again = Linearizer.from_spec(linearizer.spec)
    assert again.linearize(tables) == expected
    assert again.spec == linearizer.spec


def test_template_takes_mappings_and_keeps_order() -> None:
    assert Linearizer.template().linearize([{"b": "1", "a": "2"}, [("a", "1"), ("a", "2")]]) == [
        "b : 1 | a : 2",
        "a : 1 | a : 2",
    ]


@pytest.mark.parametrize("row", ["a : b", {}, {"a": 1}, {"a": None}, [("a", "b", "c")], [["a"]], 7])
def test_template_refuses(row: object) -> None:
    with pytest.raises(DataError, match="row 0"):
        Linearizer.template().linearize([row])


@pytest.mark.parametrize(
    "item",
    ["", "{key}", "{value}", "{key}{value}{", "{key}{value}}", "{key}{value}{x}", "{key!r}{value}", "{}{key}{value}"],
)
def test_template_refuses_item(item: str) -> None:
    with pytest.raises(ConfigError, match="template item"):
        Linearizer.template(item=item)


def test_spec() -> None:
    assert json.loads(Linearizer.e2e().spec) == {"style": "e2e"}
    assert json.loads(Linearizer.template().spec) == {
        "style": "template",
        "item": "{key} : {value}",
        "separator": " | ",
        "start": "",
        "end": "",
    }
    assert Linearizer.from_spec('{"style": "template"}').spec == Linearizer.template().spec
    assert json.loads(Linearizer.webnlg().spec) == {"style": "webnlg", "leading_bar": True, "bare_first": False}
    assert json.loads(Linearizer.dart().spec) == {"style": "dart", "lower": True}
    assert Linearizer.from_spec('{"style": "webnlg"}').spec == Linearizer.webnlg().spec
    for made in (Linearizer.webnlg(leading_bar=False, bare_first=True), Linearizer.dart(lower=False)):
        assert Linearizer.from_spec(made.spec).spec == made.spec
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
        '{"style": "dart", "lower": "yes"}',
        '{"style": "dart", "leading_bar": true}',
        '{"style": "webnlg", "bare_first": 1}',
        '{"style": "WebNLG"}',
        "[" * 100_000,
    ]:
        with pytest.raises(ConfigError):
            Linearizer.from_spec(wrong)


def test_surrogates_are_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        Linearizer.template().linearize([{"a": "\ud800"}])


# ---- WebNLG and DART ----


def webnlg(triples: list[tuple[str, str, str]], entry: int, leading_bar: bool, bare_first: bool) -> str:
    """One entry in the format of the prefix-tuning authors' scripts."""
    text = ""
    for j, (subject, relation, object) in enumerate(triples):
        if (entry > 0 or not bare_first) and (j > 0 or leading_bar):
            text += " | "
        text += f"{subject} : {relation} : {object}"
    return text


def dart(triples: list[tuple[str, str, str]], lower: bool = True) -> str:
    """One entry in the format of the prefix-tuning authors' scripts."""
    text = ""
    for j, (subject, relation, object) in enumerate(triples):
        if j > 0:
            text += " | "
        text += f"{subject} : {relation.lower() if lower else relation} : {object}"
    return text


HOSTILE = st.one_of(
    TEXT,
    st.text('{} |:\n"_\\İΣA😀\0', max_size=8),
    st.sampled_from(["", "{key}", "{s} | {o}", " | ", "a : b", "\u2028", "AΣ", "AΣ B", "ß"]),
)
STATEMENTS = st.lists(st.lists(st.tuples(HOSTILE, HOSTILE, HOSTILE), min_size=1, max_size=4), max_size=4)


@given(STATEMENTS, st.booleans(), st.booleans(), st.booleans())
@settings(derandomize=True, deadline=None)
def test_triples(tables: list[list[tuple[str, str, str]]], leading_bar: bool, bare_first: bool, lower: bool) -> None:
    made = Linearizer.webnlg(leading_bar=leading_bar, bare_first=bare_first)
    expected = [webnlg(table, entry, leading_bar, bare_first) for entry, table in enumerate(tables)]
    assert made.linearize(tables) == Linearizer.from_spec(made.spec).linearize(tables) == expected
    mappings = [[UserDict(subject=s, property=p, object=o) for s, p, o in table] for table in tables]
    assert made.linearize(mappings) == expected
    made = Linearizer.dart(lower=lower)
    assert (
        made.linearize(tables)
        == Linearizer.from_spec(made.spec).linearize(mappings)
        == [dart(table, lower) for table in tables]
    )


def test_lower_case_is_that_of_python() -> None:
    """Compare every character, since the authors lower-cased in Python; versions of Unicode differ in few."""
    every = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
    pages = [every[i : i + 4096] for i in range(0, len(every), 4096)]
    ours = Linearizer.dart().linearize([[("", "".join(f"x{c}y {c}\0" for c in page), "")] for page in pages])
    different = []
    for page, text in zip(pages, ours, strict=True):
        theirs = "".join(f"x{c}y {c}\0" for c in page).lower()
        different += [t for o, t in zip(text.split("\0"), f" : {theirs} : ".split("\0"), strict=True) if o != t]
    assert len(different) < 100, different
    assert all(ord(max(t)) > 0xFFF for t in different), different


def test_the_authors_webnlg_strings() -> None:
    first = [
        {"subject": "Aarhus_Airport", "property": "runwayLength", "object": "2702.0"},
        ("Aarhus_Airport", "cityServed", '"Aarhus, Denmark"'),
    ]
    second = [("A", "isPartOf", "B")]
    assert Linearizer.webnlg().linearize([first, second]) == [
        ' | Aarhus_Airport : runwayLength : 2702.0 | Aarhus_Airport : cityServed : "Aarhus, Denmark"',
        " | A : isPartOf : B",
    ]
    assert Linearizer.webnlg(bare_first=True).linearize([first, second]) == [
        'Aarhus_Airport : runwayLength : 2702.0Aarhus_Airport : cityServed : "Aarhus, Denmark"',
        " | A : isPartOf : B",
    ]


def test_dart_on_all_real_rows() -> None:
    files = sorted((SHARED / "data" / "dart").glob("*.jsonl.gz"))
    if not files:
        pytest.skip(f"the DART data is not at {SHARED}")
    tables = [
        json.loads(line)["triples"]
        for path in files
        for line in gzip.decompress(path.read_bytes()).decode().splitlines()
    ]
    assert len(tables) == 2_768 + 500
    assert Linearizer.dart().linearize(tables) == [dart(table) for table in tables]
    assert Linearizer.webnlg().linearize(tables) == [webnlg(table, 1, True, False) for table in tables]


def test_ten_megabytes_in_one_value() -> None:
    value = "é{}| \n" * 1_500_000
    assert len(value.encode()) > 10_000_000
    assert Linearizer.dart().linearize([[("s", "P", value)]]) == [f"s : p : {value}"]
    assert Linearizer.webnlg().linearize([[(value, "P", "o")]]) == [f" | {value} : P : o"]


@pytest.mark.parametrize("made", [Linearizer.webnlg(), Linearizer.dart()], ids=["webnlg", "dart"])
@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("a : b : c", "got text"),
        ({"a": "b"}, "keys and values"),
        ([("a", "b")], "keys and values"),
        ([], "no triples"),
        ({}, "no triples"),
        ([("a", "b", "c"), ("a", "b")], "a triple"),
        ([("a", "b"), ("a", "b", "c")], "a pair"),
        ([("a", "b", "c", "d")], "a triple"),
        ([("a", 5, "c")], "int"),
        ([("a", None, "c")], "NoneType"),
        (["abc"], "str"),
        ([{"subject": "a", "property": "b"}], "dict"),
        ([{"subject": "a", "property": "b", "value": "c"}], "dict"),
        ([{"subject": "a", "property": "b", "object": "c", "lang": "en"}], "dict"),
        ([5], "int"),
        (b"abc", "int"),
        (5, "int"),
        (None, "NoneType"),
    ],
)
def test_no_triples_are_refused(made: Linearizer, row: object, part: str) -> None:
    with pytest.raises(DataError, match=r"^row 1: ") as caught:
        made.linearize([[("a", "b", "c")], row])
    assert part in str(caught.value)


@pytest.mark.parametrize("made", [Linearizer.e2e(), Linearizer.template()], ids=["e2e", "template"])
def test_triples_where_none_belong_are_refused(made: Linearizer) -> None:
    with pytest.raises(DataError, match=r"row 0: .*triples"):
        made.linearize([[("a", "b", "c")]])


def test_the_authors_token_ids() -> None:
    """Token ids of the authors' data from the authors' tokenizer."""
    tokenizer = gpt2()
    source = Linearizer.e2e().linearize(["name[Alimentum], area[city centre], familyFriendly[no]"])[0]
    ids = tokenizer.encode(f" {source} <|endoftext|>" + " There is ").ids
    assert ids == [
        1438,
        1058,
        978,
        3681,
        388,
        930,
        1989,
        1058,
        1748,
        7372,
        930,
        1641,
        8030,
        1058,
        645,
        220,
        50256,
        1318,
        318,
        220,
    ]
    assert tokenizer.encode(" . " + " " + "<|endoftext|>").ids == [764, 220, 220, 50256]
    (source,) = Linearizer.webnlg().linearize([[("A_B", "p", "o")]])
    assert tokenizer.encode(f" {source} <|endoftext|>").ids[:2] == [220, 930]
