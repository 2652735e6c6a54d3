"""Official files of E2E, WebNLG and DART, written by the test: rows, splits, and errors with their lines."""

from __future__ import annotations

import gzip
import json

import pytest

from prefixfast import ConfigError, DataError
from prefixfast.data import TASKS, read_task

E2E = 'mr,ref\n"name[A], food[French]",One.\n"name[B]",Two.\n"name[A], food[French]",Three.\n'
WEBNLG = {
    "entries": [
        {
            "1": {
                "category": "Airport",
                "eid": "Id1",
                "lexicalisations": [
                    {"comment": "good", "lex": "A is B .", "lid": "Id1"},
                    {"comment": "bad", "lex": "A B", "lid": "Id2"},
                ],
                "modifiedtripleset": [
                    {"object": '"B, C"', "property": "cityServed", "subject": "A_A"},
                    {"object": "2702.0", "property": "runwayLength", "subject": "A_A"},
                ],
                "originaltriplesets": {"originaltripleset": []},
                "size": "2",
            }
        },
        {
            "2": {
                "category": "Food",
                "eid": "Id2",
                "lexicalisations": [{"comment": "ugly", "lex": "x"}],
                "modifiedtripleset": [{"subject": "s", "property": "p", "object": "o"}],
            }
        },
        {
            "3": {
                "category": "Food",
                "eid": "Id3",
                "modifiedtripleset": [{"subject": "s", "property": "p", "object": "o"}],
            }
        },
    ]
}
DART = [
    {
        "tripleset": [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "Mars Hill"]],
        "subtree_was_extended": True,
        "annotations": [{"source": "WikiSQL_decl_sents", "text": "It joined."}, {"source": "x", "text": "In 1973."}],
    },
    {"tripleset": [["a", "B", "c"]], "subtree_was_extended": False, "annotations": []},
]


@pytest.fixture
def write(tmp_path):
    def make(name: str, text: str):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return make


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_e2e(write, name):
    path = write(name, E2E)
    assert read_task("e2e", path) == [
        {"mr": "name[A], food[French]", "ref": "One."},
        {"mr": "name[B]", "ref": "Two."},
        {"mr": "name[A], food[French]", "ref": "Three."},
    ]
    grouped = read_task("e2e", path, "dev")
    assert grouped == [{"mr": "name[A], food[French]", "refs": ["One.", "Three."]}, {"mr": "name[B]", "refs": ["Two."]}]
    assert [r.line for r in grouped] == [2, 3]
    assert read_task("e2e", write("test.csv", "MR\nname[A]\nname[B]\n"), "test") == [
        {"mr": "name[A]"},
        {"mr": "name[B]"},
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_webnlg(write, indent):
    path = write("a.json", json.dumps(WEBNLG, indent=indent))
    triples = [["A_A", "cityServed", '"B, C"'], ["A_A", "runwayLength", "2702.0"]]
    first = {"triples": triples, "refs": ["A is B ."], "category": "Airport", "subset": "seen", "id": "Id1"}
    assert read_task("webnlg", path) == [first], "in training only what is good"
    every = read_task("webnlg", path, "test")
    assert every[0] == {**first, "refs": ["A is B .", "A B"]}
    assert [r["id"] for r in every] == ["Id1", "Id2", "Id3"]
    assert "refs" not in every[2]
    assert TASKS["webnlg"].prompts(every[:1], "<|endoftext|>") == [
        '  | A_A : cityServed : "B, C" | A_A : runwayLength : 2702.0 <|endoftext|>'
    ]
    assert TASKS["webnlg"].targets(first, 0) == [" A is B . "]


def test_dart(write):
    rows = read_task("dart", write("a.json.gz", json.dumps(DART, indent=2)), "dev")
    assert rows[0] == {
        "triples": DART[0]["tripleset"],
        "refs": ["It joined.", "In 1973."],
        "source": "WikiSQL_decl_sents",
    }
    assert rows[1] == {"triples": [["a", "B", "c"]]}
    assert TASKS["dart"].prompts(rows[:1], "E") == [
        " Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill E"
    ]
    assert [r.line for r in rows] == [
        n for n, line in enumerate(json.dumps(DART, indent=2).split("\n"), 1) if line == "  {"
    ]


def test_files_of_rows(write):
    row = {"triples": [["a", "B", "c"]], "refs": ["x"]}
    for task in ("dart", "webnlg"):
        assert (
            read_task(task, write("a.jsonl", json.dumps(row)))
            == read_task(task, write("a.json", json.dumps([row])))
            == [row]
        )
    assert read_task("prompt", write("b.jsonl", '{"prompt": "a"}')) == [{"prompt": "a"}]


def changed(value, *places, to):
    """Copy of nested lists and dictionaries with one value changed, or removed for None."""
    made = json.loads(json.dumps(value))
    inner = made
    for place in places[:-1]:
        inner = inner[place]
    if to is None:
        del inner[places[-1]]
    else:
        inner[places[-1]] = to
    return made


ENTRY = ("entries", 0, "1")
WRONG = {
    "webnlg: no triples": (
        "webnlg",
        changed(WEBNLG, *ENTRY, "modifiedtripleset", to=None),
        "modifiedtripleset: expected a list of objects",
    ),
    "webnlg: no subject": (
        "webnlg",
        changed(WEBNLG, *ENTRY, "modifiedtripleset", 0, "subject", to=None),
        "subject: expected a string",
    ),
    "webnlg: no text": (
        "webnlg",
        changed(WEBNLG, *ENTRY, "lexicalisations", 0, "lex", to=None),
        "lex: expected a string",
    ),
    "webnlg: texts in a string": (
        "webnlg",
        changed(WEBNLG, *ENTRY, "lexicalisations", to="x"),
        "lexicalisations: expected a list",
    ),
    "webnlg: two numbers": ("webnlg", changed(WEBNLG, "entries", 0, "9", to={}), "its number as the only key"),
    "webnlg: no object": ("webnlg", changed(WEBNLG, "entries", 0, to=[5]), "expected a mapping, got list"),
    "dart: no triples": ("dart", changed(DART, 0, "tripleset", to=[]), "tripleset: expected a list of"),
    "dart: a pair": ("dart", changed(DART, 0, "tripleset", 1, to=["a", "b"]), "tripleset: expected a list of"),
    "dart: a number": ("dart", changed(DART, 0, "tripleset", 1, 0, to=5), "tripleset: expected a string, got 5"),
    "dart: no text": ("dart", changed(DART, 0, "annotations", 0, "text", to=None), "text: expected a string"),
    "dart: annotations in a string": ("dart", changed(DART, 0, "annotations", to="x"), "annotations: expected a list"),
}


@pytest.mark.parametrize(("task", "value", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_line_of_a_malformed_entry(write, task, value, message):
    text = json.dumps(value)
    path = write(
        "a.json", "\n\n" + text.replace('"entries": [', '"entries": [\n', 1) if task == "webnlg" else "[\n\n" + text[1:]
    )
    with pytest.raises(DataError) as caught:
        read_task(task, path)
    assert message in str(caught.value)
    line = 4 if task == "webnlg" else 3
    assert (caught.value.line, str(caught.value)[: len(str(path)) + 4]) == (line, f"{path}:{line}: ")


CUT = {
    "webnlg: cut": ("webnlg", json.dumps(WEBNLG)[:-1], "']}' at its end"),
    "webnlg: more": ("webnlg", json.dumps(WEBNLG)[:-1] + ', "x": 1}', "']}' at its end"),
    "webnlg: other keys": ("webnlg", '{"rows": []}', "at least one row"),
    "webnlg: two lists": ("webnlg", '{"train": [{"a": "b"}], "dev": []}', "expected one list of rows, got the lists"),
    "dart: an object": ("dart", '{"entries": []}', "expected rows, got the list entries"),
    "dart: cut": ("dart", json.dumps(DART)[:-1], "']' at its end"),
    "webnlg: empty": ("webnlg", '{"entries": []}', "at least one row"),
    "dart: empty": ("dart", "[]", "at least one row"),
}


@pytest.mark.parametrize(("task", "text", "message"), CUT.values(), ids=CUT)
def test_a_file_of_another_layout_is_refused(write, task, text, message):
    path = write("a.json", text)
    with pytest.raises(DataError) as caught:
        read_task(task, path)
    assert message in str(caught.value)
    assert str(caught.value.path) == str(path)


def test_a_bad_csv_row_and_a_bad_split(write):
    with pytest.raises(DataError, match=r"a\.csv:4: expected 2 cells"):
        read_task("e2e", write("a.csv", E2E.replace(",Three.", "")), "dev")
    with pytest.raises(ConfigError, match="split: expected one of train, dev, test, got 'eval'"):
        read_task("e2e", write("b.csv", E2E), "eval")
