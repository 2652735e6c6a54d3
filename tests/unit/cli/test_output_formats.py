"""Output files of `generate` and `score`: columns of the input beside the result, in every format and on stdout."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oracles import ROOT
from prefixfast import PrefixStore
from prefixfast.cli.records import Records, generated
from prefixfast.cli.result_file import ResultFile, StandardOutput
from prefixfast.cli.result_formats import file_content, format_of, left_out, one_line
from prefixfast.data import read_rows
from prefixfast.errors import ConfigError

FAST = ("--max-new-tokens", 3, "--max-num-seqs", 2, "--max-model-len", 64)
TEXTS = [
    "plain",
    "",
    'a "b", c',
    "two\nlines",
    "a\\nb",
    "\\",
    "cr\rlf\r\n",
    "u\u2028v\x85w\x0b\x1c",
    "=1+1",
    "é 世",
    "\t",
]


@dataclasses.dataclass
class Result:
    """A result with the fields of `Generation` that every format has."""

    index: int
    text: str
    texts: list[str]
    error: str | None = None
    logprobs: Any = None
    finish_reason: str = "stop"


def results(texts: list[str]) -> list[Any]:
    return [Result(i, text, [text]) for i, text in enumerate(texts)]


def content(name: str, rows: list[dict], made: list[Any], **fields: bool) -> bytes:
    makes = Records(rows, generated(**{"logprobs": False, "errors": False, "details": False} | fields))
    return file_content(Path(name), makes, [makes.record(r) for r in made])


LINES = ["plain", "", 'a "b", c', "two lines", "a\\nb", "\\", "cr lf ", "u v w  ", "=1+1", "é 世", "\t"]


def test_every_text_comes_back_from_every_format():
    rows = [{"n": i, "note": text} for i, text in enumerate(TEXTS)]
    lines = content("o.jsonl", rows, results(TEXTS)).decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{**r, "text": t} for r, t in zip(rows, TEXTS, strict=True)]
    table = list(csv.DictReader(io.StringIO(content("o.csv", rows, results(TEXTS)).decode(), newline="")))
    assert [(r["n"], r["note"], r["text"]) for r in table] == [(str(i), t, t) for i, t in enumerate(TEXTS)]
    text = content("o.txt", rows, results(TEXTS)).decode()
    assert text.count("\n") == len(TEXTS)
    assert text.splitlines() == text.split("\n")[:-1], "no other character ends a line"
    assert text.splitlines() == LINES, "as official scorers read it"
    assert [one_line(t) for t in TEXTS] == LINES


def test_a_csv_is_read_by_this_package(tmp_path):
    rows = [{"prompt": "a", "table": {"k": ["v", 1]}, "x": None, "f": 0.5}, {"prompt": "b\nc", "extra": True}]
    (tmp_path / "o.csv").write_bytes(content("o.csv", rows, results(["t", "u"])))
    found = read_rows(tmp_path / "o.csv")
    assert list(found[0]) == ["prompt", "table", "x", "f", "extra", "text"]
    assert (found[0]["table"], found[0]["f"], found[1]["prompt"], found[1]["extra"]) == (
        {"k": ["v", 1]},
        "0.5",
        "b\nc",
        "true",
    )


def test_several_texts_of_a_row():
    made: list[Any] = [Result(0, "a", ["a", "b\n"]), Result(1, "", [], error="RequestError: x")]
    rows = [{"n": 1}, {"n": 2}]
    first, second = content("o.jsonl", rows, made, errors=True).splitlines()
    assert json.loads(first) == {"n": 1, "text": "a", "error": None, "texts": ["a", "b\n"]}
    assert json.loads(second) == {"n": 2, "text": "", "error": "RequestError: x"}
    table = list(csv.reader(io.StringIO(content("o.csv", rows, made, errors=True).decode(), newline="")))
    assert table == [
        ["n", "text", "error", "text_2"],
        ["1", "a", "", "b\n"],
        ["2", "", "RequestError: x", ""],
    ]
    assert content("o.txt", rows, made, errors=True) == b"a\nb \n\n\n"


@pytest.mark.parametrize("columns", [("text",), ("text", "input_text"), ("texts", "text_2"), ("Text", "score")])
def test_no_column_is_lost_to_a_field(columns):
    row = {c: f"mine {c}" for c in columns}
    makes = Records([row], generated(logprobs=False, errors=False, details=False))
    record = makes.record(results(["made"])[0])
    assert record["text"] == "made"
    assert sorted(map(str, record.values())) == sorted([*row.values(), "made"])
    assert set(makes.renamed) == set(columns) & {"text", "texts", "text_2"}
    (line,) = csv.DictReader(io.StringIO(content("o.csv", [row], results(["made"])).decode(), newline=""))
    assert sorted(line.values()) == sorted([*row.values(), "made"])


def test_what_plain_text_cannot_hold_is_named(tmp_path, caplog):
    makes = Records([{"n": 1}], generated(logprobs=True, errors=True, details=False))
    records = [makes.record(*results(["a"]))]
    assert left_out(Path("o.txt"), makes, records) == ["the columns of the input", "logprobs", "error"]
    other = records[0] | {"base_mismatch": "quantized"}
    assert left_out(Path("o.txt"), makes, [other])[-1] == "base_mismatch"
    assert left_out(Path("o.csv"), makes, records) == []
    with caplog.at_level("INFO"), ResultFile(tmp_path / "o.txt", makes, makes) as file:
        file.finish(results(["a"]))
    assert "logprobs, error" in caplog.text


def test_texts_that_a_spreadsheet_reads_as_formulas_are_unchanged_and_counted(tmp_path, caplog):
    makes = Records([{}] * 3, generated(logprobs=False, errors=False, details=False))
    with caplog.at_level("INFO"), ResultFile(tmp_path / "o.csv", makes, makes) as file:
        file.finish(results(["=A1", "fine", "-1"]))
    assert (tmp_path / "o.csv").read_text() == "text\n=A1\nfine\n-1\n"
    assert "2 texts begin with" in caplog.text


def test_line_breaks_of_plain_text_are_counted(tmp_path, caplog):
    makes = Records([{}] * 4, generated(logprobs=False, errors=False, details=False))
    with caplog.at_level("INFO"), ResultFile(tmp_path / "o.txt", makes, makes) as file:
        file.finish(results(["a\nb", "fine", "", "c\u2028d"]))
    assert (tmp_path / "o.txt").read_bytes() == b"a b\nfine\n\nc d\n"
    assert "2 texts have line breaks" in caplog.text


@pytest.mark.parametrize("name", ["o", "o.json", "o.txt.bz2", "o.gz", ".jsonl/o.xml"])
def test_an_unknown_suffix_names_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"\.jsonl, \.csv, \.txt"):
        format_of(Path(name))


def test_results_on_standard_output_are_in_order_and_come_early(capfd):
    makes = Records([{"n": i} for i in range(3)], generated(logprobs=False, errors=True, details=False))
    made = results(["a", "b", "c"])
    with StandardOutput(makes) as out:
        out.add(made[1])
        assert capfd.readouterr().out == ""
        out.add(made[0])
        assert [json.loads(line)["n"] for line in capfd.readouterr().out.splitlines()] == [0, 1]
        out.finish(made)
    assert [json.loads(line)["text"] for line in capfd.readouterr().out.splitlines()] == ["c"]


# ---- the commands ----


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "in.csv"
    path.write_text('prompt,note,completion\nab,"x, y",c\ncd,=z,d\n', encoding="utf8")
    return path


def test_generate_writes_the_columns_and_the_text(cli, folder, rows, tmp_path, caplog):
    caplog.set_level("INFO")
    same = []
    for name in ("o.jsonl", "o.csv", "o.jsonl.gz", "o.csv.gz"):
        caplog.clear()
        done = cli("generate", rows, "-o", tmp_path / name, "--model", folder, *FAST)
        assert done.code == 0, done.err
        assert caplog.text.count("'note'") == 1
        same.append([(r["prompt"], r["note"], r["completion"], r["text"]) for r in read_rows(tmp_path / name)])
    assert all(found == same[0] for found in same)
    assert [r[:3] for r in same[0]] == [("ab", "x, y", "c"), ("cd", "=z", "d")]
    for arguments in ((), ("-o", "-")):
        done = cli("generate", rows, *arguments, "--model", folder, *FAST)
        assert done.code == 0
        lines = [json.loads(line) for line in done.out.splitlines()]
        assert [tuple(r.values()) for r in lines] == same[0]
        assert "standard output: 2 texts" in done.err
    assert cli("generate", rows, "-o", tmp_path / "o.txt.gz", "--model", folder, *FAST).code == 0
    written = gzip.decompress((tmp_path / "o.txt.gz").read_bytes()).decode()
    assert written.splitlines() == [one_line(r[3]) for r in same[0]]


def test_score_writes_the_columns_and_the_numbers(cli, folder, rows, tmp_path):
    for name in ("o.jsonl", "o.csv"):
        assert cli("score", rows, "-o", tmp_path / name, "--model", folder).code == 0
    lines, table = read_rows(tmp_path / "o.jsonl"), read_rows(tmp_path / "o.csv")
    assert list(lines[0]) == list(table[0]) == ["prompt", "note", "completion", "logprob", "num_tokens", "is_greedy"]
    assert [float(r["logprob"]) for r in table] == [r["logprob"] for r in lines]
    assert cli("score", rows, "--details", "--model", folder).out.count('"token_logprobs"') == 2


def test_single_failures_and_log_probabilities(cli, folder, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "ab", "n": 1}\n{"prompt": "", "n": 2}\n{"prompt": "cd", "n": 3}\n')
    how = ("--model", folder, "--on-error", "return", "--logprobs", 1, *FAST)
    for name in ("o.jsonl", "o.csv"):
        assert cli("generate", path, "-o", tmp_path / name, *how).code == 3
        made = read_rows(tmp_path / name)
        assert [int(r["n"]) for r in made] == [1, 2, 3]
        assert [bool(r["error"]) for r in made] == [False, True, False]
        tokens = [json.loads(r["logprobs"]) if name == "o.csv" else r["logprobs"] for r in (made[0], made[2])]
        assert all(token["top"] for own in tokens for token in own)


def test_a_misspelt_key_with_a_meaning_is_refused(cli, folder, tmp_path):
    path = tmp_path / "in.jsonl"
    for key, meant in (("prefx", "prefix"), ("param", "params")):
        path.write_text(json.dumps({"prompt": "a", key: "x"}) + "\n")
        done = cli("generate", path, "--model", folder, *FAST)
        assert (done.code, f"in.jsonl:1: unknown column '{key}': did you mean '{meant}'" in done.err) == (1, True)
    path.write_text(json.dumps({"prompt": "a", "label": "x", "suffix": 1, "title": 2}) + "\n")
    assert cli("generate", path, "--model", folder, *FAST).code == 0


def test_a_prefix_of_a_store_by_its_name(cli, folder, rows, tmp_path, base, make_prefix):
    store = PrefixStore(tmp_path / "shop")
    for name in ("mill", "wheel"):
        store.put(name, make_prefix(len(name), base=base.fingerprint))
    how = (rows, "-o", tmp_path / "o.jsonl", "--details", "--store", store.path, *FAST)
    assert cli("generate", *how, "--prefix", "mill", "--prefix", "wheel").code == 0
    digests = "+".join(store.info(n).digest for n in ("mill", "wheel"))
    assert [r["prefix_digest"] for r in read_rows(tmp_path / "o.jsonl")] == [digests] * 2
    done = cli("score", rows, "-o", tmp_path / "o.jsonl", "--store", store.path, "--prefix", "mil")
    assert (done.code, "did you mean 'mill'" in done.err) == (1, True)


def process(*arguments: object, stdin: bytes = b"", cwd: Path) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "prefixfast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, check=False)


def test_quiet_reads_standard_input_and_writes_the_results_alone(folder, tmp_path):
    stdin = b'{"prompt": "ab", "id": 1}\n\n{"prompt": "cd", "note": 2}\n'
    done = process(
        "generate", "-", "--quiet", "--model", folder, "--dtype", "float32", *FAST, stdin=stdin, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, b"")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["prompt"], r.get("id"), r.get("note")) for r in lines] == [("ab", 1, None), ("cd", None, 2)]


def test_a_reader_that_ends_early_is_no_error(folder, tmp_path):
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "ab", "note": "x" * 9999}) + "\n" for _ in range(40)))
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "prefixfast", "generate", rows, "-q", "--model", folder, "--max-new-tokens", "1"]
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stderr is not None
    assert run.stdout.readline()
    run.stdout.close()
    assert b"Error" not in run.stderr.read()
    run.wait()
    run.stderr.close()
