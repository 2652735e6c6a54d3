"""Runs of several processes: the result of one process, the errors of one of them, and other numbers of processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError
from prefixfast.training.batching import Share, micro_batches
from prefixfast.training.examples import TokenizeOptions, tokenize_rows
from prefixfast.training.ranks import ALONE, rank_and_size

SCRIPT = Path(__file__).parents[2] / "rank_cases.py"
TOLERANCE = 1e-9  # in fp64, where only the order of sums differs


def run_cases(folder, *names):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *names], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: pickle.loads((folder / f"{name}.pickle").read_bytes()) for name in names}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("ranks"), "batches", "prefixes", "failures", "resumed")


def distance(a, b):
    assert {n: [*kv] for n, kv in a.items()} == {n: [*kv] for n, kv in b.items()}
    return max((a[n][t] - b[n][t]).abs().max().item() for n in a for t in a[n])


def assert_metrics_equal(a, b):
    assert {n: [*m] for n, m in a.items()} == {n: [*m] for n, m in b.items()}
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_two_processes_that_divide_the_rows_of_steps_have_the_result_of_one(cases):
    runs = cases["batches"]["runs"]
    (one,), two = runs[1], runs[2]
    for own in two:
        assert distance(own["kv"], one["kv"]) < TOLERANCE
        assert_metrics_equal(own["metrics"], one["metrics"])
        assert own["examples"] == one["examples"]
    assert distance(two[0]["kv"], two[1]["kv"]) == 0
    assert one["metrics"]["b"]["best_step"] < one["metrics"]["b"]["steps"]  # best states and early stopping are used


def test_two_processes_write_the_files_of_one(cases):
    files, runs = cases["batches"]["files"], cases["batches"]["runs"]
    assert files[1] == files[2]
    assert len(runs[1][0]["log"].splitlines()) == len(runs[2][0]["log"].splitlines())


def test_two_processes_divide_prefixes_and_exchange_nothing_in_a_step(cases):
    found = cases["prefixes"]
    (one,), two = found["runs"][1], found["runs"][2]
    (first, second) = found["names"][2]
    assert {*first} & {*second} == set()
    assert {*first, *second} == {*found["names"][1][0]}
    assert distance(found["stored"][2], found["stored"][1]) < TOLERANCE
    for own in two:
        assert own["sums"] == 0
        assert own["steps"] == one["steps"]
        assert distance(own["kv"], one["kv"]) < TOLERANCE
        assert_metrics_equal(own["metrics"], one["metrics"])
        assert own["failed"] == one["failed"]
        assert [*own["failed"]] == ["bad"]
        assert own["examples"] == one["examples"]


@pytest.mark.parametrize(
    ("kind", "error", "rank"), [("step", "ValueError: memory is broken", 1), ("callback", "Cut: ", 0)]
)
def test_the_failure_of_one_process_ends_all(cases, kind, error, rank):
    told = f"PrefixFastError: process {rank} of 2 has failed: {error}"
    assert cases["failures"][kind] == [error if own == rank else told for own in range(2)]


def test_other_data_on_a_process_are_refused_on_all(cases):
    assert [text.partition(":")[0] for text in cases["failures"]["data"]] == ["ConfigError"] * 2


def test_processes_can_train_after_a_failure(cases):
    assert cases["failures"]["again"] == [3, 3]


def assert_resumed(found):
    (whole,) = found["whole"]
    for (argument, _, after), runs in found["runs"].items():
        assert len(runs) == after
        for own in runs:
            assert distance(own["kv"], whole["kv"]) < TOLERANCE
            assert own["examples"] == whole["examples"] // 2  # the checkpoint is that of step 4 of 8
            assert own["failed"] == whole["failed"]
            assert [*own["failed"]] == ["lost"]
        if argument == "store":
            assert found["left"][argument, _, after] == []


def test_a_run_resumes_with_another_number_of_processes(cases):
    assert_resumed(cases["resumed"])


@pytest.mark.long
def test_runs_resume_with_more_and_fewer_processes(tmp_path):
    assert_resumed(run_cases(tmp_path, "resumed_long")["resumed_long"])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_hold_every_example_once_with_the_weights_of_the_whole_batch(size):
    import prefixfast
    from token_rows import rows

    with prefixfast.load(tiny.make("gpt2")) as model:
        examples = tokenize_rows(model, {"a": rows(0, 9)}, TokenizeOptions(Task("input_ids"), 50))
    chosen, prefix = np.array([4, 1, 7, 2, 0, 8]), np.array([0, 0, 0, 1, 1, 2], np.int32)
    how = {"token_budget": 20, "sequence_sum": False, "device": torch.device("cpu")}

    def tokens(micros):
        return sorted(
            (int(i), int(t), float(w))
            for m in micros
            for i, t, w in zip(m.target_prefix, m.targets, m.weights, strict=True)
            if not m.is_filler
        )

    shares = [[*micro_batches(examples, chosen, prefix, **how, share=Share(r, size, True))] for r in range(size)]
    assert tokens([m for share in shares for m in share]) == tokens(micro_batches(examples, chosen, prefix, **how))
    assert len({len(share) for share in shares}) == 1
    assert all(float(m.weights.sum()) == 0 for share in shares for m in share if m.is_filler)
    loads = [sum(m.num_tokens for m in share if not m.is_filler) for share in shares]
    assert max(loads) - min(loads) <= int(examples.sizes.max())


def test_one_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_size() == (0, 1)
    with ALONE.together():
        assert ALONE.gather(3) == [3]
        assert ALONE.first(lambda: 4) == 4
        assert not ALONE.any(False)


def test_the_environment_of_a_launcher_is_read(monkeypatch):
    values = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert rank_and_size() == (3, 8)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK='first'"):
        rank_and_size()
