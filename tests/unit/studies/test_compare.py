"""Command `prefixfast compare`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import prefixfast
from oracles import ROOT
from prefixfast import Prefix
from prefixfast.config.sites import SITES
from prefixfast.data import TASKS
from prefixfast.demo import SEQ2SEQ_BASE
from prefixfast.studies.compare import estimate
from prefixfast.studies.compare.runner import RESULTS, RUNS, read_results


@pytest.fixture
def words(folder, rows_file, tmp_path) -> list:
    """A short comparison on the command line."""
    words = ["compare", rows_file, "--model", folder, "-o", tmp_path / "out", "--dtype", "float32", "--max-steps", "2"]
    return [*words, "--metrics", "BLEU", "--max-new-tokens", "4", "--num-beams", "1", "--methods", "prefix"]


def test_the_command_has_a_run_in_a_process_of_its_own(cli, words, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = cli(*words, "--seeds", "1", "--task", "e2e", "--split", "train")
    assert done.code == 0, done.err
    warning = "or another release"
    assert (caplog.text.count(warning), done.err.count(warning)) == (1, 0), "once, and not in the process of the run"
    assert "one seed: no spread" in done.out
    results = (tmp_path / "out" / RESULTS).read_bytes()
    found = json.loads(results)
    assert found["environment"]["versions"]["prefixfast"] == prefixfast.__version__
    assert (found["study"]["model"], found["study"]["data"]) == ("tiny-gpt2", "rows.jsonl")
    again = cli(*words, "--seeds", "1", "--task", "e2e", "--split", "train")
    assert again.code == 0, again.err
    assert "finished before" in again.err
    assert (tmp_path / "out" / RESULTS).read_bytes() == results
    assert (tmp_path / "out" / "table.md").read_text().startswith("# Comparison")
    assert (tmp_path / "out" / "compare.png").exists()


def test_the_command_exits_with_3_if_a_run_failed(cli, words, in_process):
    done = cli(*words, "--seed", "13", "--seeds", "2", "--json")
    assert done.code == 3, done.err
    found = json.loads(done.out)
    assert found["failed"] == {"prefix, seed 13": "the gradient was not finite"}
    assert [m["seeds"] for m in found["methods"]] == [[14]]
    assert in_process == ["prefix, seed 13", "prefix, seed 14"]


def test_an_error_of_several_runs_is_said_once(cli, words, tmp_path, in_process, monkeypatch):
    error, several = "the gradient was not finite", ("--seed", "13", "--seeds", "1", "--methods", "prefix-mlp")
    done = cli(*words, *several)
    assert (done.code, len(in_process)) == (3, 2)
    assert done.err.count(error) == 2, "when it happens, and behind the tables"
    assert cli(*words, *several, "-o", tmp_path / "other", "--quiet").err.count(error) == 1
    monkeypatch.setattr(estimate, "_in_own_process", lambda run: {"error": error})
    done = cli(*words, "--seeds", "3", "--dry-run")
    assert (done.code, done.err.count(error)) == (3, 1)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "rows.jsonl"
    names = ("Mill", "Inn", "Bar", "Pub", "Den", "Hall")
    rows = [{"document": f"The {name} is near. It is old.", "summary": f"The {name} is old."} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_encoder_decoder_bases_have_three_methods(cli, documents, tmp_path, in_process):
    words = ["compare", documents, "--model", SEQ2SEQ_BASE, "-o", tmp_path / "out", "--seeds", "1", "--max-steps", "2"]
    words += ["--max-source-length", "32", "--batch-size", "4", "--max-new-tokens", "4", "--metrics", "ROUGE", "--json"]
    done = cli(*words)
    assert done.code == 0, done.err
    assert [m["method"] for m in json.loads(done.out)["methods"]] == ["prefix", "lora", "full"]
    assert len(in_process) == 3
    for name, reason in (("infix", "its encoder reads"), ("adapter", "decoder-only"), ("prompt", "attend")):
        refused = cli(*words, "--methods", f"full,{name}")
        assert refused.code == 1
        assert name in refused.err
        assert reason in refused.err
    assert len(in_process) == 3, "nothing was trained"


def test_each_site_of_an_encoder_decoder_base_is_compared(cli, documents, tmp_path, in_process):
    words = ["compare", documents, "--model", SEQ2SEQ_BASE, "-o", tmp_path / "out", "--seeds", "1", "--max-steps", "1"]
    words += ["--max-source-length", "16", "--max-new-tokens", "2", "--metrics", "lengths"]
    done = cli(*words, "--num-beams", "1", "--methods", "prefix,prefix-self,prefix-enc,prefix-cross")
    assert done.code == 0, done.err
    made = [Prefix.from_pretrained(found.parent) for found in (tmp_path / "out").rglob("prefixfast.json")]
    assert len(in_process) == len(made) == 4
    length = made[0].length_at(made[0].sites[0])
    expected = {SITES: 3 * length, **{(site,): length for site in SITES}}
    assert {p.sites: p.num_rows for p in made} == expected


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_continues_from_its_checkpoint(folder, rows_file, tmp_path, end):
    words = ["compare", rows_file, "--model", folder, "--methods", "prefix", "--seeds", "1", "--dtype", "float32"]
    words += ["--max-steps", "150", "--batch-size", "4", "--save-steps", "5", "--max-new-tokens", "4"]
    words += ["--metrics", "BLEU,NIST", "--quiet"]
    command = [sys.executable, "-m", "prefixfast", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-o", tmp_path / "whole"], env=env, check=True)
    with subprocess.Popen([*command, "-o", tmp_path / "cut"], env=env) as process:
        logs = tmp_path / "cut" / RUNS
        while sum(len(p.read_bytes().splitlines()) for p in logs.glob("*/model/log.jsonl")) < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(end)
        assert process.wait() in (130, -end)
    assert not (tmp_path / "cut" / RESULTS).exists()
    done = subprocess.run([*command[:-1], "-o", tmp_path / "cut"], env=env, check=True, capture_output=True, text=True)
    assert done.returncode == 0
    whole, cut = (read_results(tmp_path / name)[0] for name in ("whole", "cut"))
    assert cut["metrics"] == whole["metrics"]
    assert cut["quality"] == whole["quality"]
    assert TASKS["e2e"].name == cut["task"]
