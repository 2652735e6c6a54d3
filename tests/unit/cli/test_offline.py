"""Each corpus is read, trained on, generated for and scored while no socket can connect."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from prefixfast.data.corpora import CORPORA

TRIPLES = [{"subject": "Fan", "property": "colour", "object": "red"}]
ENTRY = {"modifiedtripleset": TRIPLES, "category": "Food", "eid": "Id1"}
WEBNLG = {"entries": [{"1": {**ENTRY, "lexicalisations": [{"comment": "good", "lex": t} for t in ("Red.", "A fan.")]}}]}
DART = [{"tripleset": [["Fan", "COLOUR", "red"]], "annotations": [{"source": "x", "text": t} for t in ("Red.", "A.")]}]
CELL = {"value": "red", "is_header": False, "column_span": 1, "row_span": 1}
TOTTO = {
    "example_id": 1,
    "table": [[{**CELL, "value": "Colour", "is_header": True}], [CELL]],
    "highlighted_cells": [[1, 0]],
    "table_page_title": "Fan",
    "table_section_title": "Kinds",
    "table_section_text": "",
    "sentence_annotations": [{"final_sentence": "It is red."}],
}
FILES = {
    "e2e": ("e2e.csv", "mr,ref\nname[Fan],A fan.\nname[Fan],The fan.\n"),
    "webnlg": ("webnlg.json", json.dumps(WEBNLG)),
    "dart": ("dart.json", json.dumps(DART)),
    "totto": ("totto.jsonl", json.dumps(TOTTO) + "\n"),
    "xsum": ("x.source", "The mill closed.\n"),
    "cnn_dailymail": ("c.csv", 'id,article,highlights\na,The mill closed.,"Mill\nclosed."\n'),
    "samsum": ("s.json", '[{"id": "1", "dialogue": "A: Tea?\\r\\nB: Yes.", "summary": "Tea."}]'),
    "dialogsum": (
        "d.jsonl",
        '{"fname": "test_0", "dialogue": "A: Tea?", "summary1": "a", "summary2": "b", "summary3": "c"}\n',
    ),
}
REFERENCES = {"e2e": 2, "webnlg": 2, "dart": 2, "dialogsum": 3}
FAST = ("--max-steps", 1, "--prefix-length", 2, "--dtype", "float32", "--recipe", "default")
FEW = ("--max-new-tokens", 2, "--min-new-tokens", 0, "--num-beams", 1, "--length-penalty", 1.0, "--max-num-seqs", 4)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refused(self, address, *_):
        msg = f"a connection to {address}"
        raise AssertionError(msg)

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)


@pytest.mark.parametrize("task", CORPORA)
def test_a_corpus_needs_no_network(cli, folder, tmp_path, task):
    name, text = FILES[task]
    file = tmp_path / name
    file.write_text(text)
    if file.suffix == ".source":
        file.with_suffix(".target").write_text("It closed.\n")
    prefix, texts, scores = tmp_path / "p", tmp_path / "t.txt", tmp_path / "s.jsonl"
    given = ("--split", "test", "--prefix", prefix)
    for arguments in (
        ("data", "check", file, "--task", task, "--split", "test"),
        ("train", folder, file, "-o", prefix, "--task", task, "--split", "train", "--eval-data", file, *FAST),
        ("generate", file, "-o", texts, *given, *FEW),
        ("score", file, "-o", scores, *given),
    ):
        done = cli(*arguments)
        assert done.code == 0, done.err
    assert texts.read_text().count("\n") == 1
    assert len(Path(scores).read_text().splitlines()) == REFERENCES.get(task, 1)
