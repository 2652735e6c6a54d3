"""The command line of training: every argument reaches the run, dry runs write nothing, exit codes say how it went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from oracles import ROOT
from prefixfast import Prefix, PrefixConfig, PrefixStore, TrainConfig
from prefixfast.training.defaults import default_learning_rate

FAST = ("--max-steps", 2, "--batch-size", 2, "--prefix-length", 3, "--dtype", "float32")
LETTERS = [{"prompt": f"{a}=", "completion": a * 3, "user": "xy"[i % 2]} for i, a in enumerate("abcd")]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "rows.jsonl", LETTERS)


def test_a_column_a_store_and_a_frozen_prefix(cli, folder, data, tmp_path):
    assert cli("train", folder, data, "-o", tmp_path / "first", *FAST)[0] == 0
    code, out, err = cli(
        "train",
        folder,
        data,
        "-o",
        tmp_path / "ps",
        *FAST,
        "--prefix-column",
        "user",
        "--store",
        tmp_path / "store",
        "--on-top-of",
        tmp_path / "first",
    )
    assert code == 0, err
    assert [line.split("\t")[:4] for line in out.splitlines()[1:]] == [[n, "trained", "2", "2"] for n in "xy"]
    store = PrefixStore(tmp_path / "store")
    assert {n: store[n].digest for n in store} == {n: Prefix.from_pretrained(tmp_path / "ps" / n).digest for n in "xy"}
    assert store["x"].training["on_top_of"] == Prefix.from_pretrained(tmp_path / "first").digest


def test_a_sweep_and_overrides(cli, folder, data, tmp_path):
    code, _, err = cli(
        "train",
        folder,
        data,
        "-o",
        tmp_path / "s",
        *FAST,
        "--sweep",
        "learning-rate=1e-3,1e-2",
        "--sweep",
        "seed=0,1",
        "--eval-data",
        data,
    )
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if p.is_dir() and p.name != "checkpoint") == [
        f"learning_rate={r},seed={s}" for r in ("0.001", "0.01") for s in (0, 1)
    ]
    (tmp_path / "own.yaml").write_text("x: {learning_rate: 1e-5, max_steps: 1}\n")
    code, _, err = cli(
        "train",
        folder,
        data,
        "-o",
        tmp_path / "o",
        *FAST,
        "--prefix-column",
        "user",
        "--overrides",
        tmp_path / "own.yaml",
    )
    assert code == 0, err
    assert Prefix.from_pretrained(tmp_path / "o" / "x").training["config"]["learning_rate"] == 1e-5
    assert Prefix.from_pretrained(tmp_path / "o" / "x").training["metrics"]["steps"] == 1


def test_some_that_fail_are_exit_code_3(cli, folder, data, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    code, out, err = cli(
        "train", folder, f"good={data}", f"bad={bad}", f"none={tmp_path / 'none.jsonl'}", "-o", tmp_path / "ps", *FAST
    )
    assert code == 3
    assert out.splitlines()[1].startswith("good\ttrained\t4\t2\t")
    assert [line.split(":")[0] for line in err.splitlines()[-2:]] == ["bad failed", "none failed"]
    assert {json.loads(line)["prefix"] for line in (tmp_path / "ps" / "failed.jsonl").read_text().splitlines()} == {
        "bad",
        "none",
    }
    assert Prefix.from_pretrained(tmp_path / "ps" / "good").length == 3
    assert (
        cli("train", folder, f"good={data}", f"bad={bad}", "-o", tmp_path / "r", *FAST, "--on-error", "raise")[0] == 1
    )


def test_a_dry_run_writes_nothing(cli, folder, data, tmp_path):
    code, out, err = cli(
        "train",
        folder,
        data,
        "-o",
        tmp_path / "p",
        *FAST,
        "--prefix-column",
        "user",
        "--dry-run",
        "--max-steps",
        50,
        "--init",
        "random",
    )
    assert code == 0, err
    told = json.loads(out)
    assert not (tmp_path / "p").exists()
    stored = 3 * 2 * 3 * 32
    assert (told["prefixes"], told["examples"], told["steps"], told["stored_numbers"]) == (2, 4, 50, stored)
    assert told["learning_rates"] == [default_learning_rate("random", 3, uses_mlp=True)]
    assert told["trained_numbers"] == 3 * 32 + 32 * 512 + 512 + 512 * 192 + 192
    assert told["training_bytes"] == 2 * 4 * 4 * told["trained_numbers"]
    assert told["base_bytes"] > 100_000
    assert 0 < told["seconds_per_step"] < 10
    assert told["seconds"] == pytest.approx(50 * told["seconds_per_step"])
    assert told["peak_bytes"] > told["base_bytes"]


def test_the_printed_config_is_one_that_is_read(cli, folder, data, tmp_path):
    code, out, err = cli(
        "train",
        folder,
        data,
        "-o",
        tmp_path / "p",
        "--recipe",
        "paper",
        "--task",
        "prompt",
        "--batch-size",
        3,
        "--print-config",
    )
    assert code == 0, err
    shown = yaml.safe_load(out)
    assert set(shown) == {*TrainConfig.names(), *PrefixConfig.names(), "method"}
    assert (shown["batch_size"], shown["learning_rate"], shown["encoder_hidden_size"], shown["loss"]) == (
        3,
        5e-5,
        512,
        "sequence_sum",
    )
    assert not (tmp_path / "p").exists()
    (tmp_path / "shown.yaml").write_text(out)
    again = cli("train", folder, data, "-o", tmp_path / "p", "--config", tmp_path / "shown.yaml", "--print-config")
    assert (again[0], again[1]) == (0, out)
    generated = cli("generate", data, "-o", tmp_path / "g", "--max-new-tokens", 3, "--print-config")
    assert yaml.safe_load(generated[1])["max_new_tokens"] == 3


def test_a_number_or_a_word(cli, folder, data, tmp_path):
    code, _, err = cli(
        "train",
        folder,
        data,
        "-o",
        tmp_path / "p",
        "--max-steps",
        1,
        "--token-budget",
        50,
        "--prefix-length",
        "text",
        "--init-text",
        "abcd",
    )
    assert code == 0, err
    prefix = Prefix.from_pretrained(tmp_path / "p")
    assert prefix.length == 4
    assert prefix.training["config"]["token_budget"] == 50
    code, _, err = cli("train", folder, data, "-o", tmp_path / "q", "--token-budget", "some")
    assert code == 1
    assert "TrainConfig.token_budget: expected int | 'auto', got 'some'" in err


def interrupt_when(log: Path, pid: int) -> None:
    """Ctrl-C once the log has a line."""
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)


def test_an_interrupted_run_exits_with_130_after_a_checkpoint_and_goes_on(cli, folder, data, tmp_path):
    log, state = tmp_path / "p" / "log.jsonl", tmp_path / "p" / "checkpoint" / "0" / "state.json"
    run = (
        "train",
        folder,
        data,
        "-o",
        tmp_path / "p",
        *FAST,
        "--max-steps",
        200,
        "--logging-steps",
        1,
        "--init",
        "random",
    )
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    thread = threading.Thread(target=interrupt_when, args=(log, os.getpid()))
    thread.start()
    try:
        code, _, err = cli(*run)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, old)
    assert code == 130
    assert "--resume goes on from the checkpoint" in err
    step = json.loads(state.read_text())["state"]["step"]
    assert 0 < step < 200
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, step + 1))
    code, _, err = cli(*run, "--resume")
    assert code == 0, err
    assert cli(*run[:4], tmp_path / "whole", *run[5:])[0] == 0
    assert Prefix.from_pretrained(tmp_path / "p").digest == Prefix.from_pretrained(tmp_path / "whole").digest


@pytest.mark.long
def test_an_interrupted_process_exits_with_130(folder, data, tmp_path):
    """A real process, a real Ctrl-C."""
    command = ["train", folder, data, "-o", tmp_path / "p", *FAST, "--max-steps", 3000, "--logging-steps", 1]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        [sys.executable, "-m", "prefixfast", *map(str, command)], env=env, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, old)
    interrupt_when(tmp_path / "p" / "log.jsonl", running.pid)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "--resume goes on from the checkpoint" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep", "learning_rate"), "--sweep: expected FIELD=VALUE,VALUE"),
        (("--sweep", "seed=1", "--sweep", "seed=2"), "different fields"),
        (("--overrides", "nowhere.yaml"), "--overrides nowhere.yaml: cannot be read"),
        (("--on-top-of", "nowhere"), "nowhere: no such folder"),
        (("--recipe", "papers"), "recipe: expected default"),
        (("--early-stopping-patience", "2"), "expected eval_steps beside it"),
        (("--prefix-column", "name"), "rows.jsonl:1: prefix_column: expected a column 'name', got the columns"),
    ],
)
def test_mistakes_are_one_message(cli, folder, data, tmp_path, arguments, message):
    code, _, err = cli("train", folder, data, "-o", tmp_path / "p", *FAST, *arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("words", [("--layers", "0,1"), ("--layers", "0", "--layers", "1"), ("--layers=1, 0",)])
def test_an_option_with_commas_can_be_given_several_times(cli, folder, tmp_path, words):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    done = cli("train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "p", "--print-config", *words)
    assert done.code == 0, done.err
    assert sorted(yaml.safe_load(done.out)["layers"]) == [0, 1]
