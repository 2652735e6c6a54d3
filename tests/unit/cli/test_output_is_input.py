"""Commands that would replace one of their own inputs are refused before any work, and the input stays as it is."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

ROWS = '{"mr": "name[A]", "ref": "a b"}\n{"mr": "name[B]", "ref": "c"}\n'
WHY = "is read by this command"


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Working folder with rows, texts and references."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(ROWS.encode()))
    (tmp_path / "hyp.json").write_text('[{"text": "a b"}, {"text": "c"}]')
    (tmp_path / "refs.json").write_text('[{"ref": "a b"}, {"ref": "c"}]')
    for name in ("log.jsonl", "failed.jsonl", "results.jsonl"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(ROWS)
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    os.link(tmp_path / "rows.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "linked").symlink_to("out")
    return tmp_path


SCORES = ("--task", "e2e", "--metrics", "length")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "hyp.json", "refs.json", *SCORES, "-o", "hyp.json"),
        ("eval", "hyp.json", "refs.json", *SCORES, "-o", "./out/../refs.json"),
        ("eval", "hyp.json", ".", *SCORES, "-o", "refs.json"),
        *[(name, "rows.jsonl", "-o", "rows.jsonl") for name in ("generate", "score")],
        ("generate", "rows.jsonl", "-o", "link.jsonl"),
        ("generate", "link.jsonl", "-o", "rows.jsonl"),
        ("generate", "rows.jsonl", "-o", "hard.jsonl"),
        ("generate", "rows.jsonl.gz", "-o", "rows.jsonl.gz"),
        ("generate", "out/log.jsonl", "-o", "linked/log.jsonl"),
        ("generate", ".", "--split", "dev", "-o", "rows.jsonl"),
        ("train", "none", "out/log.jsonl", "--overwrite", "-o", "out"),
        ("train", "none", "out/failed.jsonl", "-o", "linked"),
        ("train", "none", "out", "--overwrite", "-o", "out"),
        ("train", "none", "a=rows.jsonl", "b=out/log.jsonl", "-o", "out"),
        ("train", "none", "rows.jsonl", "--eval-data", "out/log.jsonl", "--overwrite", "-o", "out"),
        ("compare", "out/failed.jsonl", "--model", "none", "-o", "out"),
        ("compare", "rows.jsonl", "--eval-data", "out/results.jsonl", "--model", "none", "-o", "out"),
        ("bench", "tokenize", "none", "out/results.jsonl", "-o", "out"),
    ],
    ids=" ".join,
)
def test_an_output_that_is_an_input_is_refused(cli, files, words):
    def contents() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}

    before = contents()
    done = cli(*words)
    assert done.code == 1
    assert WHY in done.err
    assert contents() == before


def test_an_adapter_is_not_converted_onto_itself(cli, files):
    done = cli("convert", "out", "linked")
    assert (done.code, "is SRC" in done.err) == (1, True)


def test_another_file_is_replaced(cli, files):
    """An output of an earlier run, also in a folder beside the inputs."""
    for _ in range(2):
        done = cli("eval", "hyp.json", "refs.json", *SCORES, "-o", "out/scores.json")
        assert done.code == 0, done.err
    assert json.loads((files / "out" / "scores.json").read_text())["num_texts"] == 2
