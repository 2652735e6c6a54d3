"""Runs of several processes: the result of one process, the errors of one of them, and other numbers of processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import prefixfast
import tiny
from prefixfast.config import TrainConfig
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError
from prefixfast.model.sharded_base import shard
from prefixfast.training.batching import Share, micro_batches
from prefixfast.training.estimate import estimate
from prefixfast.training.examples import TokenizeOptions, tokenize_rows
from prefixfast.training.job import load_base
from prefixfast.training.ranks import ALONE, join_ranks, rank_and_size
from prefixfast.training.trainer import train
from seq2seq import make_seq2seq
from token_rows import rows

SCRIPT = Path(__file__).parents[2] / "rank_cases.py"
TOLERANCE = 1e-9  # in fp64, where only the order of sums differs
pytestmark = pytest.mark.timeout(600)


def run_cases(folder, *names):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *names], capture_output=True, text=True, timeout=590, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: pickle.loads((folder / f"{name}.pickle").read_bytes()) for name in names}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("ranks"), "batches", "prefixes", "failures", "resumed", "sharded")


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


def test_memory_that_runs_out_on_one_process_repeats_its_part_of_the_step(cases):
    (first, calls), (second, more) = cases["failures"]["memory"]
    assert first < TOLERANCE
    assert first == second
    assert more > calls


def test_the_death_of_a_process_ends_the_others(cases):
    killed, other = cases["failures"]["killed"]
    assert killed == "status 9"
    assert other.startswith("PrefixFastError: another process of the 2 has ended")


def test_a_value_that_cannot_be_sent_ends_all(cases):
    first, second = cases["failures"]["no pickle"]
    assert "pickle" in first
    assert second == f"PrefixFastError: process 0 of 2 has failed: {first}"


def test_other_data_on_a_process_are_refused_on_all(cases):
    assert [text.partition(":")[0] for text in cases["failures"]["data"]] == ["ConfigError"] * 2


def test_processes_can_train_after_a_failure(cases):
    assert cases["failures"]["again"] == [3, 3]


@pytest.mark.long
def test_all_methods_and_encoder_decoder_bases_have_the_result_of_one_process(tmp_path):
    found = run_cases(tmp_path, "methods")["methods"]
    assert len(found) == 8
    for sizes in found.values():
        (one,) = sizes[1]
        for own in sizes[2]:
            assert distance(own["kv"], one["kv"]) < TOLERANCE
            assert_metrics_equal(own["metrics"], one["metrics"])


def assert_resumed(found):
    (whole,) = found["whole"]
    for (argument, _, after), runs in found["runs"].items():
        assert len(runs) == after
        for own in runs:
            assert distance(own["kv"], whole["kv"]) < TOLERANCE
            assert own["examples"] == 3 * (4 + 4)  # the checkpoint of b and c is that of step 4 of 8
            assert own["unchanged"] == ("a",)
            assert own["failed"] == whole["failed"]
            assert [*own["failed"]] == ["lost"]
        if argument == "store":
            assert found["left"][argument, _, after] == []


def test_a_run_resumes_with_another_number_of_processes(cases):
    assert_resumed(cases["resumed"])


@pytest.mark.long
def test_runs_resume_with_more_and_fewer_processes(tmp_path):
    assert_resumed(run_cases(tmp_path, "resumed_long")["resumed_long"])


def assert_sharded(found):
    runs = {name: runs for name, runs in found.items() if 1 in runs}
    assert len(runs) == (len(found) - 1) // 3 * 2
    for name, sizes in runs.items():
        (one,) = sizes[1]
        held = found[f"{name.partition(' ')[0]} sizes"]
        for own in sizes[2]:
            assert distance(own["kv"], one["kv"]) < TOLERANCE
            assert_metrics_equal(own["metrics"], one["metrics"])
            assert len(own["held"]) == 2  # before the first step and after the last one
            for now in own["held"]:
                assert now["whole"] == held["all"] - held["layers"]
                # Each weight is divided along its first dimension, and filled up to an even number of rows.
                assert held["layers"] // 2 <= now["divided"] <= held["layers"] * 0.55
    first, second = found["failure"]
    assert second == "ValueError: memory is broken"
    assert first.startswith("PrefixFastError: another process of the 2 has ended")


def test_two_processes_that_hold_the_base_together_have_the_result_of_one(cases):
    assert_sharded(cases["sharded"])


@pytest.mark.long
def test_processes_hold_bases_of_other_families_together(tmp_path):
    assert_sharded(run_cases(tmp_path, "sharded_long")["sharded_long"])


def test_a_base_is_not_divided_in_one_process_nor_a_loaded_one_nor_for_weights(base, monkeypatch):
    row = {"prompt": "a", "completion": "b"}
    with pytest.raises(ConfigError, match="expected several processes"):
        train(base, [row], shard_base=True)
    with pytest.raises(ConfigError, match="method 'full' does not read it"):
        train(base, [row], shard_base=True, method="full")
    with pytest.raises(ConfigError, match="by name"), load_base(base, TrainConfig(shard_base=True)):
        pass
    with pytest.raises(ConfigError, match="dry run"):
        estimate(base, [row], shard_base=True)


def test_a_base_with_an_encoder_is_not_divided():
    with prefixfast.load(make_seq2seq("bart")) as model, pytest.raises(ConfigError, match=r"shard_base: .* cannot"):
        shard(model)


def test_a_base_with_adapters_is_not_divided():
    base = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with prefixfast.load(base) as model, pytest.raises(ConfigError, match=r"shard_base: .* adapters"):
        shard(model)


def test_a_plugin_of_accelerate_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_FSDP is set"):
        join_ranks()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_hold_every_example_once_with_the_weights_of_the_whole_batch(size):
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
