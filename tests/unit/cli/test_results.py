"""Output files of `generate` and `score`: no id, interrupt or full disk loses the results of other rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import ROOT
from prefixfast.cli.records import Records, generated
from prefixfast.cli.result_file import ResultFile
from prefixfast.engine import generate as module
from prefixfast.errors import ConfigError

FAST = ("--max-new-tokens", 3, "--max-num-seqs", 1, "--max-model-len", 64)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().split(b"\n")[:-1]]


IDS = ["\ud800", "a\udfffb", "\u00e9", "", 7, None, True, 1.5, [1, "\ud83d"], {"k": None}, "x" * 300, "\u2028"]


def test_every_id_that_json_has_comes_back(cli, folder, tmp_path):
    rows = write(tmp_path / "in.jsonl", [{"prompt": "ab", "completion": "c", "id": i} for i in IDS])
    for command, more in (("generate", FAST), ("score", ())):
        done = cli(command, rows, "-o", tmp_path / "out.jsonl", "--model", folder, *more)
        assert done.code == 0, done.err
        assert [line["id"] for line in read(tmp_path / "out.jsonl")] == IDS
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("command", ["generate", "score"])
@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e999"])
def test_an_id_that_json_does_not_have_is_refused_before_any_work(cli, folder, tmp_path, command, bad):
    rows = tmp_path / "in.jsonl"
    row = '{"prompt": "a", "completion": "b"'
    rows.write_text(f'{row}}}\n{row}, "id": {bad}}}\n')
    done = cli(command, rows, "-o", tmp_path / "out.jsonl", "--model", tmp_path / "no-model")
    assert done.code == 1
    assert "in.jsonl:2: id: expected a value that JSON can hold" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_id_of_a_type_of_parquet_is_refused_before_any_work(cli, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"prompt": ["a"], "id": arrow.array([b"x"])}), tmp_path / "in.parquet")
    done = cli("generate", tmp_path / "in.parquet", "-o", tmp_path / "out.jsonl", "--model", tmp_path / "no-model")
    assert done.code == 1
    assert "id: expected a value that JSON can hold, got bytes" in done.err


class Interrupt:
    """Stands for `module.generate_each` with an interrupt after some results."""

    def __init__(self, count: int, error: BaseException) -> None:
        self.count, self.error, self.real = count, error, module.generate_each

    def __call__(self, on_result, *arguments, **how):
        def add(result):
            on_result(result)
            self.count -= 1
            if not self.count:
                raise self.error

        return self.real(add, *arguments, **how)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, os.strerror(28))], ids=["interrupt", "full disk"])
def test_an_interrupted_run_keeps_what_is_finished_and_says_where(cli, folder, tmp_path, monkeypatch, error):
    rows = write(tmp_path / "in.jsonl", [{"prompt": a * 2, "id": a} for a in "abcde"])
    command = ("generate", rows, "-o", tmp_path / "out.jsonl", "--details", "--model", folder, *FAST)
    (tmp_path / "out.jsonl").write_text("earlier")
    with monkeypatch.context() as m:
        m.setattr(module, "generate_each", Interrupt(3, error))
        done = cli(*command)
    assert done.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert f"3 results are in {tmp_path / 'out.jsonl.partial'}" in done.err
    partial = read(tmp_path / "out.jsonl.partial")
    assert [(line["index"], line["id"]) for line in partial] == [(0, "a"), (1, "b"), (2, "c")]
    assert (tmp_path / "out.jsonl").read_text() == "earlier"
    again = cli(*command)
    assert again.code == 1
    assert "holds results of a run that was interrupted" in again.err
    assert read(tmp_path / "out.jsonl.partial") == partial
    (tmp_path / "out.jsonl.partial").rename(tmp_path / "kept.jsonl")
    assert cli(*command).code == 0
    assert read(tmp_path / "out.jsonl")[:3] == partial, "equal to the results of a whole run"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "kept.jsonl", "out.jsonl"]


def test_results_come_while_other_requests_run(folder):
    met = []
    with pytest.raises(ZeroDivisionError):
        module.generate_each(
            lambda result: met.append(result.index) or (len(met) == 2 and 1 / 0),
            ["ab", "cd", "ef", "gh"],
            model=folder,
            max_new_tokens=2,
            max_num_seqs=1,
            progress=False,
        )
    assert met == [0, 1]


KILLED = """
import os, signal, sys
from pathlib import Path
from prefixfast.cli.records import Records, generated
from prefixfast.cli.result_file import ResultFile
import dataclasses
@dataclasses.dataclass
class Result:
    index: int
makes = Records([{}] * 5, generated(logprobs=False, errors=False, details=True))
file = ResultFile(Path(sys.argv[1]), makes, makes)
for i in range(5):
    file.add(Result(i))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_its_results(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out.jsonl"], env=env, check=False)
    assert run.returncode == -signal.SIGKILL
    assert [line["index"] for line in read(tmp_path / "out.jsonl.partial")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "where", ["folder", "file/out.jsonl", "n" * 250 + ".jsonl", "/proc/prefixfast/out.jsonl"], ids=ascii
)
@pytest.mark.parametrize("command", ["generate", "score"])
def test_an_output_that_cannot_be_written_is_an_error_before_any_work(cli, tmp_path, command, where):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    rows = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b"}])
    done = cli(command, rows, "-o", tmp_path / where, "--model", tmp_path / "no-model")
    assert done.code == 1
    assert "no-model" not in done.err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_partial_file_is_no_result(tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    makes = Records([], generated(logprobs=False, errors=False, details=False))
    partial.touch()
    with ResultFile(out, makes, makes) as file:
        partial.write_text("{}")
        with pytest.raises(ConfigError, match="interrupted or is running"):
            ResultFile(out, makes, makes)
        file.finish([])
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
