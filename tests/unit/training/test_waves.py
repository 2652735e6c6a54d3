"""Groups in waves: bounded memory, the same results, and runs that go on in the wave in which they ended."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import prefixfast
import tiny
from cut_runs import Cut
from prefixfast.training import waves
from prefixfast.training.step import StepRunner
from prefixfast.training.trainer import train
from seq2seq import make_seq2seq
from seq2seq import rows as seq2seq_rows
from token_rows import distance, rows

DATA = {f"u{i}": rows(i, 1 + 2 * (i % 4)) for i in range(7)}
HOW = {
    "num_train_epochs": 2,
    "batch_size": 2,
    "prefix_length": 3,
    "learning_rate": 1e-2,
    "init": "random",
    "reparameterization": "none",
    "progress": False,
}
P, FP64 = 3, 8


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as loaded:
        yield loaded


class Watch:
    """Names of each wave, and the end of the run after a number of steps of all waves."""

    def __init__(self, most=10**6):
        self.names, self.left = [], most

    def on_train_begin(self, names, steps):
        self.names.append(list(names))

    def on_step(self, step, losses, grad_norms, active):
        self.left -= 1
        if not self.left:
            raise Cut


@pytest.fixture
def in_waves(monkeypatch, model):
    """Waves of two or three prefixes."""
    (shape, *_) = model.layers
    one = 4 * FP64 * P * 2 * shape.num_kv_heads * shape.head_dim * len(model.layers)
    monkeypatch.setitem(waves.WAVE_BYTES, "cpu", 3 * one)


def test_waves_give_the_results_of_each_prefix_alone(model, in_waves, tmp_path):
    watch = Watch()
    run = train(model, DATA, output_dir=tmp_path, logging_steps=1, callbacks=[watch], **HOW)
    assert [*run] == [*DATA]
    assert [len(names) for names in watch.names] == [3, 2, 2]
    steps = [[int(run.metrics[n]["steps"]) for n in names] for names in watch.names]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(steps)), "the longest come first"
    assert max(distance(run[n], train(model, {n: DATA[n]}, **HOW)[n]) for n in DATA) < 1e-9
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf8").splitlines()]
    assert {line.get("group", 0) for line in lines} == {0, 1, 2}


def test_a_wrong_row_ends_its_prefix_alone(model, in_waves):
    bad = {"input_ids": [5, 6, 700], "labels": [-100, 6, 700]}
    run = train(model, {**DATA, "eve": [bad]}, **HOW)
    assert [*run] == [*DATA]
    assert [*run.failed] == ["eve"]


@pytest.mark.parametrize("place", ["output_dir", "store"])
def test_a_run_goes_on_in_the_wave_in_which_it_ended(model, in_waves, tmp_path, place):
    how = {**HOW, "save_steps": 1, "logging_steps": 1}
    whole, first = train(model, DATA, **how), Watch()
    train(model, DATA, callbacks=[first], **how)
    taken = 10**6 - first.left
    with pytest.raises(Cut):
        train(model, DATA, callbacks=[Watch(taken - 2)], **{place: tmp_path}, **how)
    again = Watch()
    run = train(model, DATA, resume=True, callbacks=[again], **{place: tmp_path}, **how)
    assert {n: p.digest for n, p in run.items()} == {n: p.digest for n, p in whole.items()}
    assert 10**6 - again.left == 3, "training went on from the last checkpoint"


@pytest.mark.parametrize("kind", ["none", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_the_size_of_a_wave_is_that_of_its_tensors(monkeypatch, family, kind):
    sizes = []
    build = StepRunner.__init__

    def seen(self, model, group, params, *args):
        build(self, model, group, params, *args)
        flat = sum(t.tensor.nbytes for t in params.current())
        own = sum(t.tensor.nbytes for t in params.params)
        made = sum(waves._state_bytes(model, job, has_eval=True) for job in group.jobs)
        sizes.append((made, 4 * own + (2 * flat if kind == "mlp" else 0) + flat))

    monkeypatch.setattr(StepRunner, "__init__", seen)
    base = tiny.make("gpt2") if family == "gpt2" else make_seq2seq("bart")
    make = rows if family == "gpt2" else seq2seq_rows
    how = {**HOW, "reparameterization": kind, "encoder_hidden_size": 8, "num_train_epochs": None, "max_steps": 1}
    train(base, {"a": make(0, 2), "b": make(1, 2)}, **how)
    ((made, expected),) = sizes
    assert made == expected
