"""Rows of a comparison."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from prefixfast.errors import DataError
from prefixfast.metrics.evaluate import evaluate
from prefixfast.studies.compare.rows import read_study_rows
from prefixfast.studies.compare.scores import score_texts
from prefixfast.studies.compare.study import Study
from unit.studies.conftest import TABLES


def test_no_held_out_input_is_trained_on_and_references_are_grouped(study):
    rows = read_study_rows(study)
    held_out = {r["mr"] for r in rows.held_out}
    assert len(held_out) == len(rows.requests) == 2  # a fifth of ten
    assert held_out.isdisjoint(r["mr"] for r in rows.train)
    assert len(rows.train) + len(rows.held_out) == 2 * len(TABLES)
    for request, references in zip(rows.requests, rows.references, strict=True):
        assert references == [f"{word} {request['mr'][5:8]}." for word in ("The", "At")]


def test_the_split_does_not_depend_on_the_order_of_the_rows(study, tmp_path):
    lines = Path(study.data).read_text().splitlines()
    random.Random(1).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(lines))
    shuffled = read_study_rows(Study(study.model, str(tmp_path / "shuffled.jsonl")))
    assert {r["mr"] for r in shuffled.requests} == {r["mr"] for r in read_study_rows(study).requests}


def test_held_out_rows_of_a_file_are_all_evaluated(study, rows_file):
    rows = read_study_rows(Study(study.model, str(rows_file), eval_data=str(rows_file)))
    assert (len(rows.train), len(rows.held_out), len(rows.requests)) == (20, 20, 10)


def test_rows_and_inputs_are_limited(study, rows_file):
    rows = read_study_rows(Study(study.model, str(rows_file), eval_data=str(rows_file), max_rows=7, max_inputs=3))
    assert (len(rows.train), len(rows.requests), len(rows.held_out)) == (7, 3, 6)
    assert {r["mr"] for r in rows.held_out} == {r["mr"] for r in rows.requests}


def test_equal_references_count_as_often_as_in_evaluate(study, tmp_path):
    """Official scripts count a reference once for each row, so that the effective length of BLEU depends on it."""
    refs = ["The Mill is by the river.", "A mill.", "A mill."]
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps({"mr": mr, "ref": ref}) + "\n" for mr in TABLES[:2] for ref in refs))
    held = Study(study.model, study.data, eval_data=str(path), metrics=["BLEU", "NIST", "length"])
    rows, texts = read_study_rows(held), ["The Mill is here.", "A mill by the river."]
    assert rows.references == [refs, refs]
    expected = evaluate(texts, path, task="e2e", metrics=held.metrics)
    assert dict(score_texts(held, rows, texts)) == dict(expected)


def test_a_conversation_is_asked_without_its_answer(study, tmp_path):
    def talk(question: str, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    talks = [talk(q, a) for q in "abcdefgh" for a in ("x", "y")]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    rows = read_study_rows(Study(study.model, str(tmp_path / "chat.jsonl")))
    assert len(rows.requests) == 1
    assert [m["role"] for m in rows.requests[0]["messages"]] == ["user"]
    assert rows.references == [["x", "y"]]


@pytest.mark.parametrize("row", [{"text": "a b"}, {"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}])
def test_rows_without_an_input_of_their_own_are_refused(study, tmp_path, row):
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    with pytest.raises(DataError, match="an input and a target"):
        read_study_rows(Study(study.model, str(tmp_path / "rows.jsonl")))


def test_rows_that_hold_out_nothing_are_refused(study, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    with pytest.raises(DataError, match="--eval-data"):
        read_study_rows(Study(study.model, str(tmp_path / "rows.jsonl")))
