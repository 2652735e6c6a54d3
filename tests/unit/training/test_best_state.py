"""Evaluation: choice of each prefix's best state, and early stopping without effect on the other prefixes."""

from __future__ import annotations

import pytest
import torch

import prefixfast
import tiny
from prefixfast.errors import ConfigError
from prefixfast.training.batching import BatchOrder
from prefixfast.training.best_state import BestState
from prefixfast.training.early_stopping import out_of_patience
from prefixfast.training.prefix_tensor import PrefixTensor
from prefixfast.training.trainer import train
from token_rows import distance, rows

# With a large learning rate and few rows, the loss on held-out rows falls and then rises.
HOW = {
    "batch_size": 3,
    "prefix_length": 3,
    "learning_rate": 8e-2,
    "init": "random",
    "reparameterization": "none",
    "prefix_dropout": 0.1,
    "max_steps": 24,
}
DATA = {"a": rows(0, 4), "b": rows(1, 6), "c": rows(2, 5)}
HELD_OUT = {n: rows(10 + i, 5) for i, n in enumerate(DATA)}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as loaded:
        yield loaded


def losses_by_step(log, name):
    """Held-out losses after steps; the one before the first step is of step 0."""
    return {
        line["step"]: line["eval_loss_by_prefix"][name]
        for line in log
        if line.get("step") and name in line.get("eval_loss_by_prefix", {})
    }


@pytest.mark.parametrize("mlp", [False, True], ids=["flat", "mlp"])
def test_each_prefix_is_saved_at_its_own_best_step(model, mlp):
    how = HOW | ({"reparameterization": "mlp", "encoder_hidden_size": 16, "learning_rate": 3e-2} if mlp else {})
    run = train(model, DATA, eval_data=HELD_OUT, eval_steps=3, **how)
    best = {}
    for name in DATA:
        seen = losses_by_step(run.log, name)
        assert list(seen) == list(range(3, 25, 3))
        best[name] = min(seen, key=seen.get)
        assert run.metrics[name]["best_step"] == best[name]
        assert run.metrics[name]["eval_loss"] == seen[best[name]]
        # The saved state is that of the best step: a second evaluation gives the same loss.
        again = train(
            model,
            DATA[name],
            eval_data=HELD_OUT[name],
            init=run[name],
            max_steps=1,
            learning_rate=1e-37,
            metric_for_best_model="last",
        )
        assert again.training["metrics"]["eval_loss"] == pytest.approx(seen[best[name]], abs=1e-6)
    assert len(set(best.values())) > 1, "the prefixes are best at different steps"
    assert min(best.values()) < 24
    last = train(model, DATA, eval_data=HELD_OUT, eval_steps=3, metric_for_best_model="last", **how)
    earliest = min(best, key=best.get)
    assert distance(last[earliest], run[earliest]) > 1e-3
    assert last.metrics[earliest]["eval_loss"] == losses_by_step(run.log, earliest)[24]


@pytest.mark.parametrize("mlp", [False, True], ids=["flat", "mlp"])
def test_early_stopping_ends_one_prefix_and_not_the_others(model, mlp, monkeypatch):
    original, packed = BatchOrder.at, []
    monkeypatch.setattr(
        BatchOrder, "at", lambda *args: (found := original(*args), packed.append(len(set(found[1]))))[0]
    )
    how = (
        HOW
        | (
            {"reparameterization": "mlp", "encoder_hidden_size": 16, "learning_rate": 3e-2}
            if mlp
            else {"learning_rate": 2e-2}
        )
        | {"max_steps": 40}
    )
    how |= {"eval_steps": 2, "early_stopping_patience": 3, "logging_steps": 1}
    run = train(model, DATA, eval_data=HELD_OUT, **how)
    steps = {n: int(m["steps"]) for n, m in run.metrics.items()}
    assert len(set(steps.values())) > 1
    assert min(steps.values()) < 40
    active = [line["prefixes"] for line in run.log if "loss" in line]
    assert active == packed
    assert active == [sum(s > i for s in steps.values()) for i in range(max(steps.values()))], (
        "an ended prefix leaves the batches"
    )
    for name in DATA:
        alone = train(model, DATA[name], eval_data=HELD_OUT[name], **how)
        assert alone.training["metrics"]["steps"] == steps[name]
        assert distance(alone, run[name]) < 1e-9
        seen = losses_by_step(run.log, name)
        assert steps[name] in (40, run.metrics[name]["best_step"] + 3 * 2)
        assert max(seen) == steps[name]


def test_patience_may_differ_by_prefix(model):
    run = train(model, DATA, eval_data=HELD_OUT, eval_steps=1, overrides={"a": {"early_stopping_patience": 1}}, **HOW)
    seen = losses_by_step(run.log, "a")
    rises = next(s for s in seen if s > 1 and seen[s] >= seen[s - 1])
    assert run.metrics["a"]["steps"] == rises
    assert run.metrics["b"]["steps"] == 24


def test_without_eval_steps_each_prefix_is_evaluated_at_its_last_step(model):
    run = train(
        model,
        {"short": rows(0, 3), "long": rows(1, 9)},
        eval_data=rows(2, 3),
        **{**HOW, "max_steps": None, "num_train_epochs": 2.0},
    )
    assert {n: list(losses_by_step(run.log, n)) for n in run} == {"short": [2], "long": [6]}


def test_evaluation_does_not_change_training(model):
    run, plain = (
        train(model, DATA["a"], eval_data=e, eval_steps=1, metric_for_best_model=m, **HOW)
        for e, m in ((HELD_OUT["a"], "last"), (None, "auto"))
    )
    assert distance(run, plain) == 0


def test_a_nan_loss_is_never_the_best():
    of_both, of_the_second = PrefixTensor(torch.zeros(4, 1, 1)), PrefixTensor(torch.zeros(3, 1), torch.tensor([1]))
    best = BestState.new([of_both, of_the_second], 2)
    everyone = torch.tensor([True, True])
    for step, losses in ((1, [2.0, torch.nan]), (2, [3.0, 1.0]), (3, [1.0, 2.0])):
        now = [t._replace(tensor=torch.full_like(t.tensor, step)) for t in best.kv]
        best.update(everyone, torch.tensor(losses, dtype=torch.float64), step, now)
    assert best.step.tolist() == [3, 2]
    assert [t.tensor.flatten().tolist() for t in best.kv] == [[3, 3, 2, 2], [2, 2, 2]]
    assert out_of_patience(best.num_worse, torch.tensor([1, 1])).tolist() == [False, True]
    assert out_of_patience(best.num_worse, torch.tensor([0, 0])).tolist() == [False, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"early_stopping_patience": 2}, "expected eval_steps beside it"),
        ({"early_stopping_patience": 2, "eval_steps": 1}, "expected eval_data or eval_fraction beside them"),
        ({"metric_for_best_model": "eval_loss"}, "expected eval_data or eval_fraction beside them"),
        (
            {"eval_steps": 1, "sweep": {"early_stopping_patience": [1, 2]}},
            "expected eval_data or eval_fraction beside them",
        ),
        ({"metric_for_best_model": "bleu"}, "metric_for_best_model: expected 'auto'"),
    ],
)
def test_options_that_need_held_out_rows_are_refused_without_them(model, fields, message):
    with pytest.raises(ConfigError, match=message):
        train(model, rows(0, 2), **HOW, **fields)
