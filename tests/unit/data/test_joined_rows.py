"""Rows of one input outside of training: one row in the place of the first, with all texts and its other columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixfast import DataError, evaluate
from prefixfast.data import read_task

MIXED = [
    {"mr": "name[A]", "ref": "alpha beta gamma delta", "id": "a1", "subset": "seen"},
    {"mr": "name[B]", "refs": ["one two three four", "two"], "id": "b1"},
    {"mr": {"name": "C"}, "ref": "red green blue black", "source": "x"},
    {"mr": "name[D]"},
    {"mr": "name[A]", "ref": "alpha", "id": "a2", "subset": "seen"},
    {"mr": "name[B]", "ref": "three", "id": "b2"},
    {"mr": {"name": "C"}, "refs": ["red"], "source": "x"},
    {"mr": "name[D]", "ref": "do re mi fa"},
    {"mr": "name[E]", "ref": "so la ti do"},
]
JOINED = [
    {"mr": "name[A]", "refs": ["alpha beta gamma delta", "alpha"], "id": "a1", "subset": "seen"},
    {"mr": "name[B]", "refs": ["one two three four", "two", "three"], "id": "b1"},
    {"mr": {"name": "C"}, "refs": ["red green blue black", "red"], "source": "x"},
    {"mr": "name[D]", "refs": ["do re mi fa"]},
    {"mr": "name[E]", "refs": ["so la ti do"]},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_inputs_keep_the_order_of_their_first_rows_and_their_columns(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", MIXED)
    with caplog.at_level("INFO"):
        assert read_task("e2e", path, "dev") == read_task("e2e", path, "test") == JOINED
    assert [row.line for row in read_task("e2e", path, "dev")] == [1, 2, 3, 4, 9]
    assert "columns id it has the values of the first row" in caplog.text
    assert read_task("e2e", path, "train") == MIXED, "each row of training is an example"


def test_outputs_meet_the_references_of_their_own_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", MIXED)
    rows = [{"text": row["refs"][0], **({"id": row["id"]} if "id" in row else {})} for row in JOINED]
    for split in (None, "test"):
        assert evaluate(rows, path, task="e2e", metrics=["BLEU"], split=split)["BLEU"] == pytest.approx(1.0)
    with pytest.raises(DataError, match="expected the id of the references at"):
        evaluate([{**rows[0], "id": "b1"}, *rows[1:]], path, task="e2e", metrics=["BLEU"])


def test_rows_without_texts_are_one_row_for_each_input_too(tmp_path):
    (tmp_path / "testset.csv").write_text('MR,id\n"name[A]",1\nname[B],2\nname[A],3\n')
    rows = [{"mr": "name[A]", "id": "1"}, {"mr": "name[B]", "id": "2"}]
    assert read_task("e2e", tmp_path / "testset.csv", "test") == rows


def test_dialogues_keep_their_order_and_columns(tmp_path):
    given = [
        {"id": "t1", "dialogue": "one", "summary": "a", "topic": "tea"},
        {"id": "t2", "document": "two", "refs": ["b", "c"], "source": "x"},
        {"id": "t3", "dialogue": "one", "summary": "d", "topic": "trip"},
        {"id": "t4", "dialogue": "two", "summary": "e"},
        {"id": "t5", "dialogue": "three", "summary": "f"},
    ]
    path = write(tmp_path / "a.jsonl", given)
    assert read_task("dialogsum", path, "test") == [
        {"document": "one", "refs": ["a", "d"], "id": "t1", "topic": "tea"},
        {"document": "two", "refs": ["b", "c", "e"], "id": "t2", "source": "x"},
        {"document": "three", "summary": "f", "id": "t5"},
    ]


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("e2e", {"mr": "name[A]", "ref": "x", "refs": ["y"]}, "got ref and refs"),
        ("e2e", {"mr": "name[A]", "refs": "x"}, "refs: expected a list of strings"),
        ("e2e", {"mr": "name[A]", "ref": 5}, "ref: expected a string"),
        ("dialogsum", {"document": "d", "refs": ["x"], "id": [1]}, "id: expected a string"),
    ],
)
def test_a_row_that_cannot_be_joined_is_named(tmp_path, task, wrong, message):
    key = "mr" if task == "e2e" else "document"
    path = write(tmp_path / "a.jsonl", [{key: wrong[key], "refs": ["z"]}, wrong])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        read_task(task, path, "dev")
