"""The flag for the encoding of files: every command that reads rows has it, and names it where a file needs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixfast import Prefix, PrefixStore, train
from prefixfast.data import read_rows
from prefixfast.data.check_data import check_data

FAST = ("--max-steps", 2, "--batch-size", 2, "--prefix-length", 3, "--dtype", "float32")
ROWS = [{"prompt": f"{a} costs", "completion": f" £{a}"} for a in "123"]


@pytest.fixture
def western(tmp_path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        "".join(["prompt;completion\r\n", *(f"{r['prompt']};{r['completion']}\r\n" for r in ROWS)]).encode("cp1252")
    )
    return path


def test_every_command_reads_the_rows_of_the_encoding(cli, folder, western, tmp_path, make_prefix):
    encoding = ("--encoding", "cp1252")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    made = {}
    for data, flag in ((western, encoding), (tmp_path / "rows.jsonl", ())):
        out = tmp_path / data.suffix[1:]
        assert cli("train", folder, data, *flag, "--eval-data", data, "-o", out / "p", *FAST).code == 0
        prefix = ("--prefix", out / "p")
        generated = cli("generate", data, *flag, "-o", out / "g.jsonl", *prefix, "--max-new-tokens", 2)
        scored = cli("score", data, *flag, "-o", out / "s.jsonl", *prefix)
        checked = cli("data", "check", "prompt", data, *flag, "--json")
        PrefixStore(out / "store").put("p", Prefix.from_pretrained(out / "p"))
        seen = cli("prefixes", "inspect", out / "store", "p", data, *flag, "--words", 0)
        assert [r.code for r in (generated, scored, checked, seen)] == [0, 0, 0, 0]
        lines = [json.loads(line) for name in "gs" for line in (out / f"{name}.jsonl").read_text().splitlines()]
        report = json.loads(checked.out)
        made[data.suffix] = Prefix.from_pretrained(out / "p").digest, lines, report["characters"], seen.out
    assert made[".csv"] == made[".jsonl"]


def test_without_the_flag_the_error_names_it(cli, folder, western, tmp_path):
    result = cli("train", folder, western, "-o", tmp_path / "p", *FAST)
    assert result.code != 0
    assert "rows.csv:2" in result.err
    assert "--encoding cp1252" in result.err
    assert cli("train", folder, western, "--encoding", "cp-1252", "-o", tmp_path / "p", *FAST).code != 0


def test_train_and_check_of_python_read_the_encoding(base, western, tmp_path):
    how = {"prefix_length": 3, "max_steps": 2, "progress": False, "eval_data": str(western), "encoding": "cp1252"}
    one = train(base, western, **how)
    assert one.digest == train(base, ROWS, **(how | {"eval_data": ROWS})).digest
    run = train(base, {"a": western, "b": ROWS}, **how)
    assert list(run) == ["a", "b"]
    assert run.failed == {}
    assert check_data(None, western, encoding="cp1252").num_problems == 0
    assert read_rows(western, encoding="cp1252") == ROWS
