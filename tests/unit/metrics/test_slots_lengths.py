"""Values that texts say, leave out or take from other tables; lengths and distinct n-grams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metric_texts import FEW
from prefixfast.metrics.lengths import lengths
from prefixfast.metrics.result import MetricUnavailable, Tables
from prefixfast.metrics.slots import Slot, is_said, slots, table_slots


def scores(outputs, references, tables) -> dict[str, float]:
    return {name: v.value for name, v in slots(outputs, references, Tables(tables, tables)).items()}


WORDS = st.sampled_from(["one", "two", "three"])

# ---- tables ----


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"mr": "name[Blue Spice], priceRange[£20-25], near[]"}, [("name", "blue spice"), ("pricerange", "£ 20 25")]),
        ({"mr": {"name": "Café"}}, [("name", "cafe")]),
        (
            {"triples": [["A_B", "born in", "X"], ["A_B", "age", "12"]]},
            [("subject", "a b"), ("born in", "x"), ("age", "12")],
        ),
        ({"table": {"a": 1, "b": None, "c": " "}}, [("a", "1")]),
        ({"table": [["a", "x"], ["b", 2]]}, [("a", "x"), ("b", "2")]),
    ],
)
def test_slots_of_tables(row, expected):
    assert table_slots(row) == [Slot(*pair) for pair in expected]


@pytest.mark.parametrize("row", [{"table": "<page_title> A"}, {"triples": [["a"]]}, {"mr": 3}, {}])
def test_tables_without_values_are_refused(row):
    with pytest.raises(MetricUnavailable, match="slots need tables of values"):
        table_slots(row)


def test_no_tables():
    for tables in (None, Tables([{"mr": {}}], [{"mr": {}}])):
        with pytest.raises(MetricUnavailable, match="slots need"):
            slots(["a"], [["a"]], tables)


# ---- what a text says ----


@pytest.mark.parametrize(
    ("slot", "text", "said"),
    [
        (("name", "blue spice"), "THE BLUE-SPICE is here.", True),
        (("name", "cafe ole"), "Café Olé", True),
        (("name", "cafe"), "cafeteria", False),
        (("age", "12"), "He is 12.", True),
        (("age", "12"), "He is 112.", False),
        (("pricerange", "cheap"), "It is low-priced.", True),
        (("pricerange", "less than £ 20"), "It costs under £20.", True),
        (("pricerange", "high"), "It is cheap.", False),
        (("customer rating", "5 out of 5"), "a five-star pub", True),
        (("familyfriendly", "yes"), "It is family-friendly.", True),
        (("familyfriendly", "yes"), "It is not family-friendly.", False),
        (("familyfriendly", "no"), "It isn't a place for children.", True),
        (("familyfriendly", "no"), "It is for adults only.", True),
        (("familyfriendly", "no"), "It is a pub.", False),
        (("familyfriendly", "yes"), "It is a pub.", False),
    ],
)
def test_values_of_slots(slot, text, said):
    assert is_said(Slot(*slot), text) is said


MILL = {"mr": "name[The Mill], eatType[pub], near[Avalon], familyFriendly[yes]"}
FAN = {"mr": "name[Fan], eatType[restaurant], near[Raja Cuisine]"}


def test_coverage_omissions_and_wrong_slots():
    outputs = ["The Mill is a pub near Raja Cuisine, not for children.", "Fan is a restaurant near Raja Cuisine."]
    found = scores(outputs, [["x"], ["y"]], [MILL, FAN])
    assert found == {"slot coverage": 5 / 7, "omissions": 1.0, "wrong slots": 1.0}  # Raja Cuisine, and no children


def test_what_a_reference_says_is_not_wrong():
    outputs, tables = ["The Mill is a pub near Raja Cuisine.", "Fan"], [MILL, FAN]
    assert scores(outputs, [["x"], ["y"]], tables)["wrong slots"] == 0.5
    assert scores(outputs, [["x", "It is near Raja Cuisine."], ["y"]], tables)["wrong slots"] == 0


def test_a_value_in_a_value_of_the_own_table_is_not_wrong():
    tables = [{"table": {"name": "Blue Spice House"}}, {"table": {"name": "Spice"}}]
    assert scores(["Blue Spice House", "Spice"], [["x"], ["y"]], tables)["wrong slots"] == 0
    for text in ("Spice", "The house has spice."):
        assert scores([text, "Spice"], [["x"], ["y"]], tables)["wrong slots"] == 0
    pubs = [{"mr": "name[The Cricketers]"}, {"mr": "name[Cricketers]"}]
    assert scores(["Cricketers is a pub.", "The Cricketers"], [["x"], ["y"]], pubs)["wrong slots"] == 0


def test_placeholders_of_dart_are_no_values():
    """Such triples stand in 61 tables of the dev split."""
    row = {"triples": [["[TABLECONTEXT]", "name", "Ann"], ["[TABLECONTEXT]", "[TITLE]", "Mayors"]]}
    assert table_slots(row) == [Slot("name", "ann"), Slot("[title]", "mayors")]
    assert table_slots({"triples": [["Ann", "in", "[TABLECONTEXT]"]]}) == [Slot("subject", "ann")]
    found = scores(["Ann", "The tablecontext."], [["x"], ["y"]], [row, {"table": {"a": "b"}}])
    assert found == {"slot coverage": 1 / 3, "omissions": 1.0, "wrong slots": 0}


@FEW
@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["one", "two", "three"]), min_size=1), min_size=1)
)
def test_a_text_of_all_values_has_them_all(tables):
    outputs = [", ".join(t.values()) for t in tables]
    rows = [{"table": t} for t in tables]
    assert scores(outputs, [[o] for o in outputs], rows) == {"slot coverage": 1, "omissions": 0, "wrong slots": 0}
    assert scores([""] * len(tables), [["x"]] * len(tables), rows)["slot coverage"] == 0
    everything = ["one two three"] * len(tables)
    known = {v for t in tables for v in t.values()}
    wrong = sum(len(known - {*t.values()}) for t in tables) / len(tables)
    assert scores(everything, [["x"]] * len(tables), rows)["wrong slots"] == pytest.approx(wrong)


# ---- lengths ----


def test_lengths():
    found = {
        n: v.value for n, v in lengths(["a b A", "", " \n", "c d"], [["a"], ["b c", "d"], ["e"], ["f"]], None).items()
    }
    assert found == {
        "length": 5 / 4,
        "reference length": 6 / 5,
        "distinct-1": 4 / 5,
        "distinct-2": 3 / 3,
        "empty": 0.5,
    }


def test_texts_without_words():
    found = {n: v.text for n, v in lengths([""], [["a"]], None).items()}
    assert found["distinct-1"] == found["distinct-2"] == "0.0000"
    assert (found["length"], found["empty"]) == ("0.00", "1.0000")
