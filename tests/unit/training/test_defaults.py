"""Defaults that follow other options and the rows: the learning rate and the number of steps."""

from __future__ import annotations

import json

import pytest
import torch

import prefixfast
import shared
import tiny
from oracles import ROOT
from prefixfast import TrainConfig
from prefixfast.demo import BASE
from prefixfast.demo.jobs import JOBS
from prefixfast.training.defaults import default_learning_rate, num_steps
from prefixfast.training.method import METHODS
from token_rows import rows

HOW = {"max_steps": 1, "prefix_length": 3, "progress": False}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 5e-2, 1e-1)
TOLERANCE = 1.05  # largest ratio of the default's held-out loss to the lowest of a sweep


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as loaded:
        yield loaded


def trained_rate(prefix):
    return prefix.training["config"]["learning_rate"]


def test_a_prefix_keeps_the_rate_that_it_was_trained_with(model):
    start = prefixfast.train(model, rows(0, 4), init="random", reparameterization="none", **HOW)
    inits = ["random", "zero", start]
    run = prefixfast.train(
        model, rows(0, 4), sweep={"init": inits}, reparameterization="none", max_steps=2, progress=False
    )
    expected = [default_learning_rate(init, len(start.layers), uses_mlp=False) for init in inits]
    assert [trained_rate(p) for p in run.values()] == expected
    mlp = prefixfast.train(model, rows(0, 4), init="random", **HOW)
    assert trained_rate(mlp) == default_learning_rate("random", len(start.layers), uses_mlp=True) < expected[0]
    given = prefixfast.train(model, rows(0, 4), init=start, learning_rate=0.125, max_steps=1, progress=False)
    assert trained_rate(given) == 0.125


@pytest.mark.parametrize(
    ("options", "per_epoch", "expected"),
    [
        ({"max_steps": 7}, 5, 7),
        ({"max_steps": 7, "num_train_epochs": 2}, 5, 7),
        ({"num_train_epochs": 2}, 5, 10),
        ({"num_train_epochs": 0.01}, 5, 1),
        ({}, 1, 80),
        ({}, 8, 80),
        ({}, 9, 90),
        ({}, 40, 400),
        ({}, 133, 400),
        ({}, 134, 402),
    ],
)
def test_number_of_steps(options, per_epoch, expected):
    assert num_steps(TrainConfig.make(options), per_epoch) == expected


def ratio(base, train_rows, held_out, rates, task=None):
    """Held-out loss of the default settings, relative to the lowest of a sweep over rates and steps."""
    how = {"eval_data": held_out, "task": task, "metric_for_best_model": "last", "progress": False}
    default = prefixfast.train(base, train_rows, **how).training["metrics"]
    steps = int(default["steps"])
    sweep = {"learning_rate": rates, "max_steps": [steps, 2 * steps]}
    metrics = prefixfast.train(base, train_rows, sweep=sweep, **how).metrics
    return default["eval_loss"] / min(m["eval_loss"] for m in metrics.values())


@pytest.fixture(scope="module")
def demo():
    with prefixfast.load(BASE, dtype="float32") as loaded:
        yield loaded


def short_rows(split, count, seed):
    """Rows of about 20 tokens with two names that the target copies."""
    tables = [row["table"] for row in JOBS[0].rows(split, count, seed)]
    return [
        {"prompt": f"{t['name']}, {t['town']}:", "completion": f" You find the {t['name']} in {t['town']}."}
        for t in tables
    ]


def test_the_defaults_are_near_the_best_of_a_sweep(demo):
    train_rows, held_out = short_rows("train", 24, 0), short_rows("heldout", 24, 1)
    how = {"eval_data": held_out, "metric_for_best_model": "last", "progress": False}
    default = prefixfast.train(demo, train_rows, **how).training["metrics"]
    assert default["steps"] == num_steps(TrainConfig(), 3)
    others = prefixfast.train(demo, train_rows, sweep={"learning_rate": [3e-2, 0.3]}, **how)
    assert default["eval_loss"] <= TOLERANCE * min(m["eval_loss"] for m in others.metrics.values())


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("task", ["e2e", "dart", "scitldr"])
def test_50_rows_of_a_real_task(task, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benches/system"))
    from default_settings import read_cell

    cell = read_cell(shared.folder(), task, 50)
    name = {"scitldr": "summary"}.get(task, task)
    with prefixfast.load(shared.folder("lm", "nlg-10m")) as base:
        assert ratio(base, cell.rows, cell.held_out, RATES, name) <= TOLERANCE


def test_the_default_rates_of_methods_are_near_the_best_of_their_sweep():
    """Measured on SmolLM2 (benches/results); a default that was not measured fails."""
    lines = (ROOT / "benches" / "results" / "method-rates-smollm2.jsonl").read_text().splitlines()
    runs = [r for r in map(json.loads, lines) if "method" in r]
    changing = {name for name, m in METHODS.items() if not m.makes_prefix}
    assert {r["method"] for r in runs} == changing
    for name in changing:
        losses = {r["rate"]: r["eval_loss"] for r in runs if r["method"] == name}
        assert len(losses) >= 3
        assert losses[METHODS[name].learning_rate] <= 1.02 * min(losses.values())
