"""Sweeps: every combination is trained as if alone, in shared batches where possible, and the best one is found."""

from __future__ import annotations

import pytest
import torch

import prefixfast
import tiny
from cut_runs import Cut
from prefixfast.errors import ConfigError
from prefixfast.training.trainer import train
from token_rows import distance, rows

HOW = {
    "batch_size": 3,
    "prefix_length": 3,
    "learning_rate": 2e-2,
    "init": "random",
    "reparameterization": "none",
    "max_steps": 5,
}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as loaded:
        yield loaded


class Count:
    def __init__(self) -> None:
        self.groups, self.ended = [], None

    def on_train_begin(self, names, steps):
        self.groups.append(list(names))

    def on_train_end(self, run):
        self.ended = run


def test_rates_and_seeds_share_the_batches(model):
    count = Count()
    data, held_out = rows(0, 6), rows(1, 5)
    run = train(
        model,
        data,
        eval_data=held_out,
        sweep={"learning_rate": [1e-9, 2e-2, 0.1], "seed": [0, 4]},
        callbacks=[count],
        **HOW,
    )
    assert len(count.groups) == 1
    assert (
        list(run)
        == count.groups[0]
        == [f"learning_rate={r},seed={s}" for r in ("1e-09", "0.02", "0.1") for s in (0, 4)]
    )
    for name, prefix in run.items():
        variant = {k: v for k, v in run.variants[name].items() if k != "of"}
        assert distance(train(model, data, eval_data=held_out, **HOW | variant), prefix) < 1e-9
    losses = {n: m["eval_loss"] for n, m in run.metrics.items()}
    assert run.best() is run[min(losses, key=losses.get)]
    assert run.best().training["config"]["learning_rate"] > 1e-3
    assert count.ended is run


def test_options_that_a_batch_shares_make_groups(model, tmp_path):
    count = Count()
    sweep = {
        "prefix_length": [2, 5],
        "learning_rate": [1e-2, 2e-2],
        "init": ["random", "zero"],
        "loss": ["token_mean", "sequence_sum"],
    }
    run = train(model, rows(0, 6), sweep=sweep, callbacks=[count], output_dir=tmp_path, **HOW)
    assert sorted(map(len, count.groups)) == [8, 8]
    assert len(run) == 16
    name = "prefix_length=5,learning_rate=0.01,init=zero,loss=sequence_sum"
    assert run[name].length == 5
    alone = train(
        model, rows(0, 6), **{**HOW, "prefix_length": 5, "learning_rate": 1e-2, "init": "zero", "loss": "sequence_sum"}
    )
    assert distance(alone, run[name]) < 1e-9
    assert prefixfast.Prefix.from_pretrained(tmp_path / name).digest == run[name].digest
    assert run.best() is run[min(run.metrics, key=lambda n: run.metrics[n]["loss"])]
    assert {line["group"] for line in run.log if "loss" in line} == {0, 1}


def test_flat_and_mlp_prefixes_share_the_batches(model):
    count = Count()
    how = {k: v for k, v in HOW.items() if k != "reparameterization"}
    start = train(model, rows(5, 3), **HOW)
    how.pop("prefix_length"), how.pop("init")
    run = train(
        model,
        rows(0, 6),
        sweep={"init": ["random", start]},
        callbacks=[count],
        prefix_config={"encoder_hidden_size": 8},
        **how,
    )
    assert count.groups == [["init=random", f"init={start.digest[:8]}"]]
    assert run["init=random"].length == 10
    assert run[f"init={start.digest[:8]}"].length == 3
    for init, prefix in zip(("random", start), run.values(), strict=True):
        alone = train(model, rows(0, 6), init=init, prefix_config={"encoder_hidden_size": 8}, **how)
        assert distance(alone, prefix) < 1e-9


def test_a_sweep_over_several_names(model):
    data = {"ann": rows(0, 4), "bob": rows(1, 4)}
    run = train(model, data, sweep={"learning_rate": [1e-9, 2e-2]}, eval_data=data, **HOW)
    assert list(run) == [
        "ann,learning_rate=1e-09",
        "ann,learning_rate=0.02",
        "bob,learning_rate=1e-09",
        "bob,learning_rate=0.02",
    ]
    assert run.best("bob") is run["bob,learning_rate=0.02"]
    with pytest.raises(ConfigError, match=r"best: expected one of the names \['ann', 'bob'\]"):
        run.best()
    with pytest.raises(ConfigError, match="no trained prefix is named 'eve'"):
        run.best("eve")


def test_best_without_a_sweep(model):
    run = train(model, {"ann": rows(0, 4), "bob": rows(1, 4)}, **HOW)
    assert run.best() is run[min(run.metrics, key=lambda n: run.metrics[n]["loss"])]
    assert run.best("ann") is run["ann"]


def test_a_sweep_resumes_in_its_group(model, tmp_path):
    class CutAt:
        def __init__(self, after: int) -> None:
            self.after = after

        def on_step(self, step, losses, grad_norms, active):
            self.after -= 1
            if not self.after:
                raise Cut

    how = {**HOW, "save_steps": 2, "logging_steps": 1, "sweep": {"max_length": [30, 40, 50], "prefix_length": [2, 3]}}
    whole = train(model, rows(0, 6), **how)
    seen = Count()
    for after in (4, 6, 4):
        with pytest.raises(Cut):
            train(model, rows(0, 6), output_dir=tmp_path, resume=True, callbacks=[CutAt(after)], **how)
    run = train(model, rows(0, 6), output_dir=tmp_path, resume=True, callbacks=[seen], **how)
    assert {n: p.digest for n, p in run.items()} == {n: p.digest for n, p in whole.items()}
    assert run.metrics == whole.metrics
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in run.log] == [
        {k: v for k, v in line.items() if k != "seconds"} for line in whole.log
    ]
    assert len(seen.groups) == 1, "only the last run was still to do"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"learning_rates": [1]}, "did you mean learning_rate"),
        ({"save_steps": [1, 2]}, "unknown option 'save_steps'"),
        ({"learning_rate": 0.1}, "expected a sequence of values, got 0.1"),
        ({"init": "random"}, "expected a sequence of values, got 'random'"),
        ({"learning_rate": []}, "expected a sequence of values"),
        ({"learning_rate": [-1.0]}, "expected more than 0"),
        ({"seed": [1, 1]}, "one twice"),
        ({}, "at least one field"),
        ([1], "expected a mapping, got list"),
        ({"init": ["random", "word"]}, "init: expected 'text', 'random'"),
    ],
)
def test_wrong_sweeps_are_refused(model, sweep, message):
    with pytest.raises(ConfigError, match=message):
        train(model, rows(0, 3), sweep=sweep, **HOW)
