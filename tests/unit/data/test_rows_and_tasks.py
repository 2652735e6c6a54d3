"""Rows from files, and the prompts and targets of tasks; errors name the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixfast import ConfigError, DataError
from prefixfast.data.builtin_tasks import E2E, TASKS, find_task, table_task
from prefixfast.data.rows import read_rows
from prefixfast.data.task import Task

ROWS = [{"prompt": "a\n£", "completion": 'é, "x"'}, {"prompt": "b", "completion": "c"}]
JSONL = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)
CSV = 'prompt,completion\n"a\n£","é, ""x"""\nb,c\n'
FILES = {
    "a.jsonl": JSONL,
    "blank.jsonl": "\n" + JSONL.replace("\n", "\n\n  \n"),
    "windows.jsonl": JSONL.replace("\n", "\r\n"),
    "no-end.jsonl": JSONL.rstrip("\n"),
    "a.v2.json": json.dumps(ROWS, indent=1),
    "a.csv": CSV,
}


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize(("name", "text"), FILES.items(), ids=FILES)
def test_files_of_every_kind_hold_the_same_rows(tmp_path, name, text, bom, gz):
    data = bom + text.encode()
    path = tmp_path / (name + ".gz" if gz else name)
    path.write_bytes(gzip.compress(data) if gz else data)
    assert read_rows(path) == read_rows(str(path)) == ROWS


@pytest.mark.parametrize("rows", [ROWS, tuple(ROWS), (r for r in ROWS)], ids=["list", "tuple", "generator"])
def test_iterables_are_rows(rows):
    assert read_rows(rows) == ROWS


def test_a_line_separator_inside_a_string_does_not_end_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf8")
    assert read_rows(tmp_path / "a.jsonl") == [{"prompt": "a\u2028b\x85c"}]


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6)),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
OBJECTS = st.lists(st.dictionaries(st.text('ab[]{},"\n\\é', max_size=3), VALUES, max_size=3), min_size=1, max_size=5)


@given(
    OBJECTS, st.lists(st.sampled_from(["", " ", "\n", "\r\n\t", "\n\n  "]), min_size=1), st.sampled_from([None, 0, 1])
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_objects_of_a_list_and_their_lines(tmp_path_factory, objects, spaces, indent):
    text, lines = "[", []
    for i, value in enumerate(objects):
        text += spaces[i % len(spaces)]
        lines.append(text.count("\n") + 1)
        text += (
            json.dumps(value, indent=indent, ensure_ascii=i % 2 == 0)
            + spaces[-1]
            + ("," if i + 1 < len(objects) else "]")
        )
    path = tmp_path_factory.getbasetemp() / "objects.json"
    path.write_bytes((text + spaces[0]).encode())
    rows = read_rows(path)
    assert rows == objects == json.loads(text)
    assert [r.line for r in rows] == lines
    path.with_suffix(".jsonl").write_text(
        "".join(f"{json.dumps(value, ensure_ascii=False)}\n\n" for value in objects), encoding="utf8", newline=""
    )
    rows = read_rows(path.with_suffix(".jsonl"))
    assert (rows, [r.line for r in rows]) == (objects, [2 * i + 1 for i in range(len(objects))])


CELLS = st.lists(st.text('ab,"\n é', max_size=5), min_size=2, max_size=2).filter(any)  # empty records are blank lines


@given(st.lists(CELLS, min_size=1, max_size=6))
@settings(derandomize=True, deadline=None)
def test_records_of_a_table_and_their_lines(tmp_path_factory, records):
    out = io.StringIO(newline="")
    writer, lines = csv.writer(out, lineterminator="\n"), []
    writer.writerow(["a", "b"])
    for record in records:
        lines.append(out.getvalue().count("\n") + 1)
        writer.writerow(record)
    path = tmp_path_factory.getbasetemp() / "records.csv"
    path.write_text(out.getvalue(), encoding="utf8", newline="")
    rows = read_rows(path)
    assert [[r["a"] or "", r["b"] or ""] for r in rows] == records
    assert [r.line for r in rows] == lines


def test_a_long_field_of_a_table_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n" + "x" * 200_000 + "\n", encoding="utf8")
    assert len(read_rows(tmp_path / "a.csv")[0]["prompt"]) == 200_000


GOOD = b'{"prompt": "a"}\n'
MALFORMED = {
    "cut object": ("a.jsonl", GOOD + b'{"prompt": \n', 2),
    "after a blank line": ("a.jsonl", GOOD + b"\n" + b"x\n", 3),
    "no object": ("a.jsonl", GOOD + b"5\n", 2),
    "no object after blank lines": ("a.jsonl", b"\n\n" + GOOD + b'"text"\n', 4),
    "deep": ("a.jsonl", GOOD + b"[" * 200_000 + b"\n", 2),
    "csv: a column less": ("a.csv", b"prompt,completion\na,b\nc\n", 3),
    "csv: a column more": ("a.csv", b"prompt,completion\na,b\nc,d,e\n", 3),
    "csv: after a record of three lines": ("a.csv", b'prompt,completion\n"a\n\nb",c\nd\n', 5),
    "csv: after blank lines": ("a.csv", b"prompt,completion\n\n\na,b\n\nc\n", 6),
    "csv: an open quote": ("a.csv", b'prompt,completion\na,b\nc,"d\n', 3),
    "csv: a column twice": ("a.csv", b"prompt,prompt\na,b\n", 1),
    "csv: not UTF-8": ("a.csv", b"prompt\na\n\xff\n", 3),
    "a key twice": ("a.jsonl", GOOD + b'{"prompt": "a", "prompt": "b"}\n', 2),
    "a key twice inside": ("a.jsonl", GOOD + GOOD + b'{"table": {"k": "a", "k": "b"}}\n', 3),
    "not UTF-8": ("a.jsonl", GOOD + b'{"prompt": "\xff"}\n', 2),
    "a huge number": ("a.jsonl", GOOD + b'{"id": ' + b"9" * 5000 + b"}\n", 2),
    "json: no object": ("a.json", b'[{"prompt": "a"},\n {"prompt":\n "b"},\n 5]', 4),
    "json: a cut list": ("a.json", b'[{"prompt": "a"},\n {"prompt": "b"}\n', 3),
    "json: a cut object": ("a.json", b'[{"prompt": "a"},\n {"prompt": "b', 2),
    "json: a comma at the end": ("a.json", b'[{"prompt": "a"},\n]', 2),
    "json: something after the list": ("a.json", b'[{"prompt": "a"}\n]\n{}', 2),
    "json: a key twice": ("a.json", b'[{"prompt": "a"},\n\n {"prompt": "b", "prompt": "c"}]', 3),
    "json: not UTF-8": ("a.json", b'[{"prompt": "a"},\n {"prompt": "\xff"}]', 2),
    "json: no object at all": ("a.json", b'"prompt"', 1),
}


@pytest.mark.parametrize(("name", "data", "line"), MALFORMED.values(), ids=MALFORMED)
def test_errors_name_the_line_of_a_malformed_row(tmp_path, name, data, line):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert (caught.value.line, str(caught.value.path)) == (line, str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name}:{line}: ")


def test_rows_of_a_file_keep_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + GOOD + b"\n\n" + GOOD)
    (tmp_path / "a.json").write_bytes(b'\n[ {"prompt": "a"}, {"prompt":\n"b"},\n\n{"prompt": "c"}]')
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\n"a\nb",c\r\n\nd,e\n')
    for name, lines in {"a.jsonl": [2, 5], "a.json": [2, 2, 5], "a.csv": [2, 5]}.items():
        rows = read_rows(tmp_path / name)
        assert [(r.path, r.line) for r in rows] == [(str(tmp_path / name), n) for n in lines]
        again = pickle.loads(pickle.dumps(rows))
        assert (again, [r.line for r in again]) == (rows, lines)


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
def test_parquet_holds_the_same_rows(tmp_path, gz):
    buffer = arrow.BufferOutputStream()
    parquet.write_table(
        arrow.Table.from_pylist(
            [{**r, "messages": None} for r in ROWS] + [{"messages": [{"role": "user", "content": "x"}]}]
        ),
        buffer,
        row_group_size=2,
    )
    raw = buffer.getvalue().to_pybytes()
    path = tmp_path / ("a.parquet.gz" if gz else "a.parquet")
    path.write_bytes(gzip.compress(raw) if gz else raw)
    rows = read_rows(path)
    assert [{k: v for k, v in r.items() if v is not None} for r in rows] == [
        *ROWS,
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    assert [r.line for r in rows] == [1, 2, 3]
    path.with_name("b.parquet").write_bytes(raw[:-9])
    with pytest.raises(DataError, match=r"b\.parquet:1: cannot be read"):
        read_rows(path.with_name("b.parquet"))


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'prefixfast\[data\]'"):
        read_rows(tmp_path / "a.parquet")


def test_a_dataset_is_an_iterable_of_rows():
    assert read_rows(datasets.Dataset(arrow.Table.from_pylist(ROWS), fingerprint="rows")) == ROWS


PACKED = gzip.compress(JSONL.encode() * 50)
UNREADABLE = {
    "missing": ("a.jsonl", None),
    "no ending": ("a", GOOD),
    "another ending": ("a.parquet", GOOD),
    "gz only": ("a.gz", gzip.compress(GOOD)),
    "empty": ("a.jsonl", b""),
    "blank": ("a.jsonl", b"\n \n"),
    "empty list": ("a.json", b"[]"),
    "header only": ("a.csv", b"prompt,completion\n"),
    "a number": ("a.json", b"5"),
    "cut list": ("a.json", b'[{"prompt": "a"}'),
    "not UTF-8": ("a.jsonl", b'{"prompt": "\xff"}'),
    "no gzip": ("a.jsonl.gz", GOOD),
    "cut gzip": ("a.jsonl.gz", PACKED[:-20]),
    "damaged gzip": ("a.jsonl.gz", PACKED[:40] + bytes(b ^ 0xFF for b in PACKED[40:60]) + PACKED[60:]),
}


@pytest.mark.parametrize(("name", "data"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_without_rows_is_refused_by_name(tmp_path, name, data):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert str(caught.value.path) == str(tmp_path / name)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match="got a folder"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{}, "x"], "row 1: expected a mapping, got 'x'"),
        ({"prompt": "a"}, "iterable of"),
    ],
)
def test_iterables_without_rows_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        read_rows(rows)


# ---- tasks ----

EOS = "<|endoftext|>"
MR = "name[Blue Spice], eatType[coffee shop], area[city centre]"
PROMPTS = {
    "the example of Li & Liang": (
        "e2e",
        {"mr": MR},
        f" name : Blue Spice | Type : coffee shop | area : city centre {EOS}",
    ),
    "renamed slots, official order": (
        "e2e",
        {"mr": "familyFriendly[no], priceRange[less than £20], name[Alimentum]"},
        f" name : Alimentum | price : less than £ 20 | family friendly : no {EOS}",
    ),
    "price range": ("e2e", {"mr": "name[A], priceRange[£20-25]"}, f" name : A | price : £ 20 - 25 {EOS}"),
    "a mapping": ("e2e", {"mr": {"name": "Blue Spice", "eatType": "pub"}}, f" name : Blue Spice | Type : pub {EOS}"),
    "table": ("table", {"table": {"Name": "Ada", "born": "1815"}}, "Name : Ada | born : 1815\n"),
    "pairs": ("table", {"table": [("k", "1"), ("k", "2")]}, "k : 1 | k : 2\n"),
    "prompt": ("prompt", {"prompt": " as it {is} "}, " as it {is} "),
    "marks in the data": ("e2e", {"mr": "name[{eos} {src}]"}, f" name : {{eos}} {{src}} {EOS}"),
}


@pytest.mark.parametrize(("task", "row", "prompt"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(task, row, prompt):
    assert TASKS[task].prompts([row], EOS) == [prompt]
    assert find_task(None, row).prompts([row], EOS) == [prompt]


@pytest.mark.parametrize(
    ("task", "row", "targets"),
    [
        ("e2e", {"mr": MR, "ref": "A pub ."}, [" A pub . "]),
        ("e2e", {"mr": MR, "refs": ["A .", "B {ref}"]}, [" A . ", " B {ref} "]),
        ("table", {"table": {"a": "b"}, "refs": ("A", "B")}, ["A", "B"]),
        ("prompt", {"prompt": "a", "completion": " b"}, [" b"]),
    ],
)
def test_targets(task, row, targets):
    assert TASKS[task].targets(row, 0) == targets


def test_prompts_without_an_end_token():
    assert E2E.prompts([{"mr": "name[A]"}], None) == [" name : A "]


@pytest.mark.parametrize(("task", "text"), [("e2e", "x"), ("table", "x"), ("prompt", " x \n")])
def test_generated_text_is_stripped_where_the_task_pads_it(task, text):
    assert TASKS[task].clean(" x \n") == text


BAD_INPUT: dict[str, tuple[str, Any]] = {
    "no table": ("e2e", {"prompt": "x"}),
    "empty table": ("e2e", {"mr": ""}),
    "unknown slot": ("e2e", {"mr": "colour[red]"}),
    "slot twice": ("e2e", {"mr": "name[a], name[b]"}),
    "empty value": ("e2e", {"mr": "name[]"}),
    "a number": ("e2e", {"mr": 5}),
    "a number in a table": ("table", {"table": {"a": 5}}),
    "no prompt": ("prompt", {"text": "x"}),
    "a prompt that is no string": ("prompt", {"prompt": None}),
}
BAD_TARGET: dict[str, tuple[str, Any]] = {
    "no reference": ("e2e", {"mr": MR}),
    "a reference that is no string": ("e2e", {"mr": MR, "ref": 5}),
    "references in a string": ("e2e", {"mr": MR, "refs": "A"}),
    "no references": ("e2e", {"mr": MR, "refs": []}),
    "a number among references": ("e2e", {"mr": MR, "refs": ["A", 5]}),
    "references in a number": ("e2e", {"mr": MR, "refs": 5}),
    "no completion": ("prompt", {"prompt": "x", "ref": "y"}),
}
FINE = {"e2e": {"mr": MR}, "table": {"table": {"a": "b"}}, "prompt": {"prompt": "x"}}


@pytest.mark.parametrize(("task", "row"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_errors_number_the_row_of_a_wrong_input(task, row):
    with pytest.raises(DataError, match="row 2"):
        TASKS[task].prompts([FINE[task], FINE[task], row], EOS)


@pytest.mark.parametrize(("task", "row"), BAD_TARGET.values(), ids=BAD_TARGET)
def test_errors_number_the_row_of_a_wrong_target(task, row):
    with pytest.raises(DataError, match="row 7") as caught:
        TASKS[task].targets(row, 7)
    assert caught.value.line == 8


OWN = table_task(item="{key}={value}", separator="; ", prompt="{src} ->", target=" {ref}\n", init_text="Tell:")


@pytest.mark.parametrize("task", [*TASKS.values(), OWN], ids=[*TASKS, "own"])
def test_a_spec_survives_json(task):
    spec = json.loads(json.dumps(task.spec()))
    assert Task.from_spec(spec) == find_task(spec, {}) == task


def test_table_task():
    assert OWN.prompts([{"table": {"a": "b", "c": "d"}}], EOS) == ["a=b; c=d ->"]
    assert OWN.targets({"ref": "x"}, 0) == [" x\n"]


BAD_SPECS = {
    "unknown key": {"name": "x", "promt": ""},
    "no name": {},
    "wrong type": {"name": "x", "prompt": 5},
    "linearizer": {"name": "x", "linearizer": "5"},
}


@pytest.mark.parametrize("spec", BAD_SPECS.values(), ids=BAD_SPECS)
def test_a_bad_spec_is_refused(spec):
    with pytest.raises(ConfigError):
        Task.from_spec(spec).prompts([{"table": {"a": "b"}, "prompt": "x"}], EOS)


@pytest.mark.parametrize(
    ("task", "row", "error"), [("webnlq", {}, ConfigError), (None, {"txt": "x"}, DataError), (5, {}, ConfigError)]
)
def test_an_unknown_task_is_refused(task, row, error):
    with pytest.raises(error, match="expected one of"):
        find_task(task, row)


def test_find_task_returns_a_task_unchanged():
    assert find_task(OWN, {}) is OWN


def test_templates_without_their_fields_are_refused():
    with pytest.raises(ConfigError):
        table_task(item="{key}")


def test_paths_may_be_given_as_objects(tmp_path):
    path = Path(tmp_path) / "a.json"
    path.write_text(json.dumps(ROWS), encoding="utf8")
    assert read_rows(path) == ROWS
