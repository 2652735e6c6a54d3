"""`eval_fraction`: rows that a run holds out of its own data, and the losses before and after training."""

from __future__ import annotations

import json

import pytest
import torch

import prefixfast
import tiny
from prefixfast import TrainConfig
from prefixfast.data import TASKS, column_task
from prefixfast.data.files import FileRow
from prefixfast.errors import ConfigError, DataError
from prefixfast.training.advice import loss_advice
from prefixfast.training.callbacks import Callback
from prefixfast.training.held_out import hold_out
from prefixfast.training.inputs import TrainingRows
from prefixfast.training.trainer import train
from token_rows import distance, rows

HOW = {
    "batch_size": 3,
    "prefix_length": 3,
    "init": "random",
    "reparameterization": "none",
    "learning_rate": 2e-2,
    "prefix_dropout": 0.1,
    "max_steps": 6,
    "progress": False,
}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as loaded:
        yield loaded


def held(own, fraction, seed=0, task=TASKS["prompt"]):
    """Kept and held-out rows of one prefix."""
    split = hold_out(TrainingRows({"a": list(own)}, None, True, {}), task, fraction, seed, isolate=False)
    return split.rows["a"], split.eval_rows["a"]


def numbered(count):
    return [{"prompt": f"{i}", "completion": "x"} for i in range(count)]


def test_nothing_is_held_out_unasked(model):
    assert TrainConfig().eval_fraction == 0
    prefix = train(model, rows(0, 9), **HOW)
    assert prefix.training["metrics"]["examples"] == 9
    assert "eval_rows" not in prefix.training["metrics"]


READ_ALIKE = {
    "number of the row": ([{"id": i, "prompt": f"{i // 2}", "completion": "x"} for i in range(20)], TASKS["prompt"]),
    "columns of one's own": (
        [{"id": f"{i}", "note": f"n{i}", "Name": f"{i // 2}", "text": "x"} for i in range(20)],
        column_task(prompt="{name} ->", target="text"),
    ),
    "references": ([{"table": {"a": f"{i // 2}"}, "refs": ["x", "y"], "id": i} for i in range(20)], TASKS["table"]),
    "token ids": ([{"input_ids": [i // 2, 1], "labels": [-100, 1], "id": i} for i in range(20)], TASKS["prompt"]),
    "conversations": (
        [{"id": i, "prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"{i // 2}"}]} for i in range(20)],
        TASKS["messages"],
    ),
}


@pytest.mark.parametrize(("own", "task"), READ_ALIKE.values(), ids=READ_ALIKE)
def test_rows_that_the_model_reads_alike_stay_together(own, task):
    kept, out = held(own, 0.3, task=task)
    assert len(out) == 6
    number = {id(row): i // 2 for i, row in enumerate(own)}
    assert {number[id(r)] for r in kept}.isdisjoint(number[id(r)] for r in out)


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.29, 29), (10, 0.1, 1), (7, 0.5, 3), (3, 0.99, 2)])
def test_the_fraction_is_rounded_down_to_rows(count, fraction, expected):
    own = numbered(count)
    kept, out = held(own, fraction)
    assert (len(kept), len(out)) == (count - expected, expected)
    assert sorted(kept + out, key=own.index) == own
    assert kept == [r for r in own if r not in out], "the order of the data stays"


def test_the_choice_depends_on_seed_and_contents_and_not_on_the_order():
    own = numbered(40)
    kept, out = held(own, 0.25)
    assert held(own, 0.25) == (kept, out)
    assert {r["prompt"] for r in held(own[::-1], 0.25)[1]} == {r["prompt"] for r in out}
    assert held(own, 0.25, seed=1)[1] != out
    reordered = [dict(reversed(r.items())) for r in own]
    assert held(reordered, 0.25)[1] == out


def test_equal_rows_and_the_references_of_a_row_stay_together(model):
    own = [row for row in numbered(20) for _ in range(3)]
    kept, out = held(own, 0.25)
    assert len(out) == 15
    assert not [r for r in kept if r in out]
    ids = rows(0, 8)
    prefix = train(model, ids, eval_fraction=0.25, **HOW)
    assert prefix.training["metrics"]["rows"] == 6
    assert prefix.training["metrics"]["eval_rows"] == 2


@pytest.mark.parametrize(
    ("own", "fraction", "message"),
    [
        (numbered(9), 0.1, "10 rows or more"),
        (numbered(1), 0.9, "2 rows or more"),
        (numbered(2), 0.3, "4 rows or more"),
        (numbered(1) * 10, 0.5, "equal"),
    ],
)
def test_too_few_rows_are_an_error_that_says_how_many_are_enough(own, fraction, message):
    with pytest.raises(DataError, match=message):
        held(own, fraction)


def test_a_prefix_with_too_few_rows_does_not_stop_the_others(model):
    run = train(model, {"many": rows(0, 8), "one": rows(1, 1)}, eval_fraction=0.25, **HOW)
    assert list(run) == ["many"]
    assert "eval_fraction" in run.failed["one"]
    with pytest.raises(DataError, match="'one'"):
        train(model, {"many": rows(0, 8), "one": rows(1, 1)}, eval_fraction=0.25, on_error="raise", **HOW)


@pytest.mark.parametrize("wrong", [1, 1.5, -0.1, float("nan"), "half"])
def test_a_fraction_of_all_rows_or_no_number_is_refused(wrong):
    with pytest.raises(ConfigError, match="eval_fraction"):
        TrainConfig(eval_fraction=wrong)


def test_held_out_rows_come_from_one_place(model):
    with pytest.raises(ConfigError, match="eval_fraction and eval_data"):
        train(model, rows(0, 8), eval_data=rows(1, 2), eval_fraction=0.25, **HOW)
    with pytest.raises(ConfigError, match="sweep"):
        train(model, rows(0, 8), sweep={"eval_fraction": [0.25, 0.5]}, **HOW)


def test_all_variants_of_a_sweep_hold_out_the_same_rows(model):
    run = train(model, rows(0, 8), eval_fraction=0.25, sweep={"seed": [0, 1], "learning_rate": [1e-2, 2e-2]}, **HOW)
    before = {m["eval_loss_before"] for n, m in run.metrics.items() if n.startswith("seed=0")}
    assert len(before) == 1
    assert run.best_name() in run


def test_training_equals_training_on_the_kept_rows_with_the_others_as_eval_data(model):
    own = rows(0, 8)
    kept, out = held(own, 0.25)
    one = train(model, own, eval_fraction=0.25, eval_steps=2, **HOW)
    two = train(model, kept, eval_data=out, eval_steps=2, **HOW)
    assert distance(one, two) == 0
    assert one.training["metrics"] == two.training["metrics"]


def test_an_error_names_the_row_of_the_data(model):
    own = [*rows(0, 7), {"input_ids": [5, 700], "labels": [-100, 700]}]
    for seed in range(4):  # the wrong row is among the kept rows or among those held out
        with pytest.raises(DataError, match="row 8 of the data"):
            train(model, own, eval_fraction=0.5, seed=seed, **HOW)
    in_file = [FileRow(row, "own.jsonl", i + 1) for i, row in enumerate(own)]
    with pytest.raises(DataError, match=r"own.jsonl:8"):
        train(model, in_file, eval_fraction=0.5, **HOW)


def test_losses_before_and_after_are_those_of_evaluations(model):
    own, out = rows(0, 6), rows(1, 4)
    untrained = train(
        model, own, eval_data=out, **HOW | {"learning_rate": 1e-37, "max_steps": 1, "metric_for_best_model": "last"}
    )
    run = train(model, {"a": own, "b": rows(2, 5)}, eval_data=out, metric_for_best_model="last", **HOW)
    metrics = run.metrics["a"]
    assert metrics["eval_loss_before"] == pytest.approx(untrained.training["metrics"]["eval_loss"], abs=1e-9)
    assert metrics["eval_loss"] != metrics["eval_loss_before"]
    assert run.log[0]["step"] == 0
    assert run.log[0]["eval_loss_by_prefix"]["a"] == metrics["eval_loss_before"]


def test_the_first_training_loss_is_that_of_the_first_step(model):
    run = train(model, {"a": rows(0, 6), "b": rows(2, 5)}, logging_steps=1, **HOW)
    for name in run:
        by_step = {line["step"]: line["loss_by_prefix"][name] for line in run.log if "loss_by_prefix" in line}
        assert run.metrics[name]["first_loss"] == by_step[1]
        assert run.metrics[name]["loss"] == by_step[6]


def test_a_resumed_run_has_the_same_rows_losses_and_metrics(model, tmp_path):
    class Stop(Callback):
        def on_step(self, step, losses, grad_norms, active):
            if step == 4:
                raise KeyboardInterrupt

    how = {**HOW, "eval_fraction": 0.25, "eval_steps": 3, "save_steps": 1}
    data = {"a": rows(0, 8), "b": rows(2, 9)}
    whole = train(model, data, output_dir=tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, output_dir=tmp_path / "cut", callbacks=[Stop()], **how)
    resumed = train(model, data, output_dir=tmp_path / "cut", resume=True, **how)
    assert resumed.metrics == whole.metrics
    assert [distance(resumed[n], whole[n]) for n in whole] == [0, 0]
    lines = [json.loads(x) for x in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, 3, 6]
    with pytest.raises(ConfigError, match="eval_fraction"):
        train(model, data, output_dir=tmp_path / "cut", resume=True, **{**how, "eval_fraction": 0.5})


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"first_loss": 4.0, "loss": 1.0}, []),
        ({"first_loss": 4.0, "loss": 4.0}, ["learning_rate (now 0.05)", "max_steps, now 30"]),
        ({"first_loss": 4.0, "loss": 3.99}, ["learning_rate", "more steps"]),
        ({"first_loss": 4.0, "loss": 5.0}, ["learning_rate", "more steps"]),
        ({"first_loss": 4.0, "loss": float("nan")}, ["learning_rate"]),
        ({"first_loss": 4.0, "loss": None}, ["learning_rate"]),
        ({"first_loss": 4.0, "loss": 5.0, "eval_loss_before": 4.0, "eval_loss": 3.0}, []),
        (
            {"first_loss": 4.0, "loss": 1.0, "eval_loss_before": 4.0, "eval_loss": 4.5},
            ["lower learning_rate", "fewer steps", "more rows"],
        ),
        ({"first_loss": 4.0, "loss": 4.0, "eval_loss_before": 4.0, "eval_loss": 4.0}, ["learning_rate", "more steps"]),
    ],
)
def test_a_loss_that_does_not_fall_gets_advice(metrics, expected):
    found = loss_advice({**metrics, "steps": 30.0}, {"learning_rate": 0.05})
    assert (found is None) == (not expected)
    assert [part for part in expected if part not in str(found)] == []


def test_a_run_whose_loss_does_not_fall_says_so(model, caplog):
    run = train(
        model, {"a": rows(0, 6), "b": rows(2, 5)}, **HOW | {"learning_rate": 1e-9, "batch_size": 6, "prefix_dropout": 0}
    )
    assert sorted(run.advice()) == ["a", "b"]
    assert "2 of 2 prefixes" in caplog.text
    assert "learning_rate (now 1e-09)" in str(run)
