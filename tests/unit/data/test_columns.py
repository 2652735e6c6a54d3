"""Rows with columns of a user's own: templates, tables, values, missing columns, and the text between both sides."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from types import MappingProxyType

import numpy as np
import pandas
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefixfast import ConfigError, DataError
from prefixfast.data import Task, column_task, find_task, read_rows
from prefixfast.data.column_text import parse_template
from prefixfast.data.columns import RESERVED, check_columns, has_target, reserved_notes
from prefixfast.data.join import runs_together

MILL = {"product_name": "Mill", "price": "12", "description": "A mill."}
TEXTS = st.text(st.one_of(st.sampled_from('{}"\n\\,a {'), st.characters(codec="utf8")), max_size=12)


def prompt_of(row, prompt="{x}"):
    return column_task(prompt=prompt, target="y").prompts([row], None)[0]


@given(x=TEXTS, price=TEXTS, y=TEXTS, texts=st.tuples(TEXTS, TEXTS, TEXTS))
@example(x="{price}", price="{x}", y="{y}", texts=("{", "}}", '{"a": {}}'))
def test_a_prompt_is_exactly_one_substitution(x, price, y, texts):
    before, between, after = (t.replace("{", "{{").replace("}", "}}") for t in texts)
    task = column_task(prompt=f"{before}{{x}}{between}{{price}}{after}", target=f"{before}{{y}}!")
    row = {"x": x, "price": price, "y": y}
    expected = f"{texts[0]}{x}{texts[1]}{price}{texts[2]}"
    again = Task.from_spec(json.loads(json.dumps(task.spec())))
    for own in (task, again):
        assert own.prompts([row, row], "</s>") == [expected] * 2
        assert own.pairs([row], "</s>") == [(expected, [f"{texts[0]}{y}!"])]


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{a}", ("", "a", "")),
        ("a {{b}} {c}", ("a {b} ", "c", "")),
        ("{{{a}}}", ("{", "a", "}")),
        ("{ Product name }, {€}->", ("", "Product name", ", ", "€", "->")),
        ("{a}{a}", ("", "a", "", "a", "")),
        ("", ("",)),
    ],
)
def test_templates(template, parts):
    assert parse_template(template) == parts


@pytest.mark.parametrize("wrong", ["{", "}", "{}", "{ }", "a}b", "{a", "a}", "{a}}", "{{a}", "{a{b}}", "}{"])
@pytest.mark.parametrize("field", ["prompt", "target"])
def test_a_lone_brace_and_an_empty_name_are_refused(field, wrong):
    fields = {"prompt": "{x}", "target": "{y}", field: f"{wrong} {{z}}"}
    with pytest.raises(ConfigError, match=f"^{field}: expected columns in braces"):
        column_task(**fields)
    spec = column_task(prompt="{x}", target="{y}").spec() | {field: f"{wrong} {{z}}"}
    with pytest.raises(ConfigError, match=field):
        Task.from_spec(spec)


ARGUMENTS = {
    "nothing": ({}, "prompt and table: expected one of them"),
    "both": ({"prompt": "{x}", "table": ["x"], "target": "y"}, "prompt and table: expected one of them"),
    "no target": ({"prompt": "{x}"}, "target: expected the column"),
    "an empty target": ({"prompt": "{x}", "target": " "}, "target: expected the name"),
    "a target of another type": ({"prompt": "{x}", "target": 3}, "target: expected the name"),
    "a prompt of another type": ({"prompt": ["x"], "target": "y"}, "prompt: expected a template"),
    "a prompt without a column": ({"prompt": "Describe: {{x}}", "target": "y"}, "prompt: expected at least one column"),
    "a target without a column": ({"prompt": "{x}", "target": "{{y}}"}, "target: expected at least one column"),
    "a table as text": ({"table": "x,y", "target": "y"}, r"table: expected different names of columns, as in table=\["),
    "an empty table": ({"table": [], "target": "y"}, "table: expected different names"),
    "a column twice": ({"table": ["x", "x"], "target": "y"}, "table: expected different names"),
    "a column without a name": ({"table": ["x", " "], "target": "y"}, "table: expected different names"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_make_no_task_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        column_task(**({"target": None} | arguments))


JOINS = {  # prompt, target: prompt and target of the row, of which only the target's text is generated
    "a space is added": ("{product_name} ->", "description", "Mill ->", " A mill."),
    "after a column too": ("{product_name}", "description", "Mill", " A mill."),
    "spaces of the prompt are moved": ("{product_name} -> ", "description", "Mill ->", " A mill."),
    "all of them": ("{product_name} ->  ", "description", "Mill ->", "  A mill."),
    "not after a line break": ("{product_name}\n", "description", "Mill\n", "A mill."),
    "not after a tab": ("{product_name}\t", "description", "Mill\t", "A mill."),
    "not after a line break and a space": ("{product_name}\n ", "description", "Mill\n", " A mill."),
    "a template is exact": ("{product_name} ->", "{description}", "Mill ->", "A mill."),
    "so is its prompt": ("{product_name} -> ", "{description}!", "Mill -> ", "A mill.!"),
}


@pytest.mark.parametrize(("prompt", "target", "left", "right"), JOINS.values(), ids=JOINS)
def test_the_text_between_prompt_and_target(prompt, target, left, right):
    task = column_task(prompt=prompt, target=target)
    assert task.pairs([MILL], None) == [(left, [right])]
    assert task.prompts([{k: v for k, v in MILL.items() if k != "description"}], None) == [left]
    assert task.clean(f" {right.strip()}\n") == right.strip()


@pytest.mark.parametrize(
    ("prompt", "target", "together"),
    [("a", "b", True), ("é", "日", True), ("4", "4", True), ("a", " b", False), ("a ", "b", False), ("a:", "b", False)],
)
def test_prompt_and_target_that_run_together(prompt, target, together):
    assert runs_together(prompt, target) == together
    assert not runs_together("", target)
    assert not runs_together(prompt, "")


VALUES = {
    "text": ("a {b}", "a {b}"),
    "empty text": ("", ""),
    "an integer": (12, "12"),
    "a float": (12.50, "12.5"),
    "a whole float": (3.0, "3.0"),
    "a boolean": (True, "true"),
    "a list": (["é", 1, None], '["é", 1, null]'),
    "a mapping": ({"a": {"b": [1]}}, '{"a": {"b": [1]}}'),
    "another mapping": (MappingProxyType({"a": (1,)}), '{"a": [1]}'),
    "a decimal": (decimal.Decimal("1.50"), "1.50"),
    "a date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "a time": (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
    "a number of numpy": (np.float32(0.5), "0.5"),
    "an integer of numpy": (np.int64(3), "3"),
    "a boolean of numpy": (np.bool_(False), "false"),
    "an array": (np.array([1, 2]), "[1, 2]"),
    "a time of pandas": (pandas.Timestamp(2026, 1, 2), "2026-01-02T00:00:00"),
}


@pytest.mark.parametrize(("value", "text"), VALUES.values(), ids=VALUES)
def test_values(value, text):
    assert prompt_of({"x": value}, "<{x}>") == f"<{text}>"
    if text:
        table = column_task(table=["x"], target="y")
        assert table.prompts([{"x": value}], None) == [f"x : {text}\n"]
        assert column_task(prompt="{a}", target="y").targets({"y": value}, 0) == [f" {text}"]


MISSING = [None, math.nan, np.float32("nan"), decimal.Decimal("nan"), pandas.NA, pandas.NaT]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_a_missing_value_is_refused_in_a_template_and_left_out_of_a_table(value):
    row = {"Name": "a", "price": value, "description": value}
    task = column_task(prompt="{name}, {price}", target="description")
    with pytest.raises(DataError, match=r"^row 1: prompt: expected a value in column 'price', got none; .* use table"):
        task.prompts([{"name": "a", "price": "b"}, row], None)
    with pytest.raises(DataError, match=r"^row 7: target: expected a value in column 'description'"):
        task.targets(row, 7)
    assert not has_target(task, row)
    table = column_task(table=["price", "name"], target="description")
    assert table.prompts([row, {"name": "b"}], None) == ["name : a\n", "name : b\n"]
    with pytest.raises(DataError, match="row 1: table: expected a value in at least one of the columns"):
        table.prompts([row, {"price": value, "name": " "}], None)


WRONG_VALUES = {
    "infinity": math.inf,
    "bytes": b"a",
    "an object": object(),
    "a set": {1},
    "an infinite decimal": decimal.Decimal("inf"),
    "not a number in a list": [math.nan],
    "bytes in a list": [b"a"],
    "half a surrogate pair": "\ud800",
    "half a surrogate pair in a list": ["\ud800"],
    "a complex number": 1j,
}


@pytest.mark.parametrize("value", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_value_without_a_text_is_refused(value):
    for task in (column_task(prompt="{x}", target="y"), column_task(table=["a", "x"], target="y")):
        with pytest.raises(DataError, match=r"^row 1: x: expected "):
            task.prompts([{"x": "fine"}, {"x": value}], None)


def test_an_empty_target_is_refused():
    task = column_task(prompt="{a}", target="y")
    for value in ("", " \n"):
        with pytest.raises(DataError, match="target: expected text in column 'y'"):
            task.targets({"y": value}, 0)


def test_columns_match_without_case_and_outer_white_space():
    task = column_task(prompt="{product name}, {PRICE}", target="Description")
    row = {" Product Name": "a", "Price ": 1, "price": 2, "description ": "c"}
    assert task.pairs([row | {"PRICE": 3}], None) == [("a, 3", [" c"])]
    with pytest.raises(DataError, match="expected one column 'PRICE', got 'Price ', 'price'"):
        task.pairs([row], None)


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    path = tmp_path / "products.csv"
    path.write_text("Product Name,price,text\nMill,12,x\n", encoding="utf8")
    (row,) = read_rows(path)
    for task, message in (
        (column_task(prompt="{product_name} ->", target="text"), "prompt: expected a column 'product_name'"),
        (column_task(prompt="{price} ->", target="tekst"), "target: expected a column 'tekst'"),
        (column_task(table=["price", "product_name"], target="text"), "table: expected a column 'product_name'"),
    ):
        for call in (lambda t=task: t.pairs([row], None), lambda t=task: check_columns(t, [row])):
            with pytest.raises(DataError) as caught:
                call()
            assert str(caught.value).startswith(f"{path}:2: {message}, got the columns 'Product Name', 'price', 'text'")
            assert "did you mean" in str(caught.value)
            assert caught.value.line == 2


def test_a_column_of_a_table_may_be_missing_in_a_row_but_not_in_all():
    task = column_task(table=["name", "colour"], target="text")
    rows = [{"name": "a", "other": 1}, {"colour": "red"}]
    check_columns(task, [row | {"text": "x"} for row in rows])
    assert task.prompts(rows, None) == ["name : a\n", "colour : red\n"]
    with pytest.raises(DataError, match="table: expected a column 'colour', got the columns 'name', 'text'"):
        check_columns(task, [{"name": "a", "text": "x"}])
    with pytest.raises(DataError, match=r"row 0: table: expected a column 'colour'.*did you mean 'color'"):
        task.prompts([{"name": "a", "color": "red"}], None)


def test_further_columns_are_allowed_and_keys_of_other_formats_are_text():
    row = {"text": "a", "prompt": "b", "id": 7, "input_ids": "c", "messages": 5, "params": "d", "y": "e"}
    task = column_task(prompt="{text}{prompt}{id}{input_ids}{params}", target="y")
    assert task.pairs([row], None) == [("ab7cd", [" e"])]
    assert not task.is_tokenized(row)
    assert not task.is_chat({"messages": [{"role": "user", "content": "x"}], "prompt": ["x"]})


def test_notes_on_columns_with_another_meaning():
    rows = [{"ID": 1, "text": "a", "prompt": "b"}, {"id": 1, "text": "a", "prefix": "c", "y": "d"}]
    task = column_task(prompt="{id}{text}", target="y")
    notes = reserved_notes(task, rows)
    expected = (("id", 0), ("text", 0), ("prefix", 1), ("prompt", 1))  # the key, and whether the mapping leaves it
    for note, (key, unused) in zip(notes, expected, strict=True):
        assert f"'{key}'" in note
        assert RESERVED[key][unused] in note
    assert reserved_notes(find_task("text", {}), rows) == []


def test_specs():
    for task in (column_task(prompt="{a}", target="b"), column_task(table=["a", "b c"], target="{c} - {d}")):
        spec = json.loads(json.dumps(task.spec()))
        assert Task.from_spec(spec) == task
        assert find_task(spec, {"anything": 1}) == task
    assert "columns" not in Task("prompt").spec(), "earlier versions read the spec of an earlier format"
    old = {"name": "prompt", "prompt": "{src}", "target": "{ref}", "strip": False, "input": None, "loss_on": "auto"}
    assert Task.from_spec(old) == Task("prompt")
    good = column_task(table=["a"], target="b").spec()
    for change in ({"columns": "a"}, {"columns": [""]}, {"columns": [3]}, {"linearizer": None}, {"input": "prompt"}):
        with pytest.raises(ConfigError, match=r"columns|linearizer"):
            Task.from_spec(good | change)
    with pytest.raises(ConfigError, match="prompt: expected at least one column"):
        Task("own", prompt="x", target="{y}", input="columns")


def test_the_text_that_a_prefix_starts_from_names_the_target():
    assert column_task(prompt="{a}", target="short_description").init_text == "Write the short description:"
    assert column_task(table=["a"], target="{b}: {c_d}").init_text == "Write the b and c d:"
    assert column_task(prompt="{a}", target="b", init_text="Text").init_text == "Text"


def test_a_number_of_fp32_has_the_digits_of_its_own_precision(tmp_path):
    task = column_task(prompt="{p} ->", target="x")
    values = [0.1, 2.5, 1234567.0, 3e-7]
    expected = ["0.1 ->", "2.5 ->", "1234567.0 ->", "3e-07 ->"]
    assert task.prompts([{"p": np.float32(v)} for v in values], None) == expected
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"p": arrow.array([*values, None], arrow.float32()), "x": ["a"] * 5})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert task.prompts(rows[:-1], None) == expected
    assert rows[-1]["p"] is None


def test_a_table_of_a_library_is_refused_with_the_call_that_gives_its_rows():
    frame = pandas.DataFrame({"name": ["a", "b"], "text": ["x", "y"]})
    with pytest.raises(DataError, match=r"DataFrame\.to_dict\('records'\)"):
        read_rows(frame)
    assert read_rows(frame.to_dict("records")) == [{"name": "a", "text": "x"}, {"name": "b", "text": "y"}]
    arrow = pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"Table\.to_pylist\(\)"):
        read_rows(arrow.Table.from_pandas(frame))
