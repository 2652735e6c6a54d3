"""Callbacks, reporters, and the plot, report and repr of a `TrainRun`."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import prefixfast
import tiny
from prefixfast.errors import ConfigError
from prefixfast.training.callbacks import HOOKS, Callback
from prefixfast.training.train_run import TrainRun
from prefixfast.training.trainer import train
from token_rows import rows

HOW = {
    "batch_size": 3,
    "prefix_length": 3,
    "learning_rate": 2e-2,
    "init": "random",
    "reparameterization": "none",
    "max_steps": 4,
    "logging_steps": 2,
}
DATA = {"a": rows(0, 4), "b": rows(1, 5)}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2")) as loaded:
        yield loaded


class Record:
    """Callback that records the name and arguments of every hook call."""

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name):
        raise AttributeError(name)


for hook in HOOKS:
    setattr(Record, hook, lambda self, *values, hook=hook: self.calls.append((hook, values)))


def test_hooks_are_called_in_order(model):
    record = Record()
    bad = {"input_ids": [5, 700], "labels": [-100, 700]}
    run = train(
        model,
        {**DATA, "bad": [bad]},
        eval_data=rows(2, 3),
        eval_steps=2,
        overrides={"b": {"max_steps": 3}},
        callbacks=[record],
        **HOW,
    )
    names = [hook for hook, _ in record.calls]
    assert names == [
        "on_prefix_failed",
        "on_train_begin",
        "on_evaluate",
        "on_log",
        "on_step",
        "on_step",
        "on_evaluate",
        "on_log",
        "on_log",
        "on_step",
        "on_evaluate",
        "on_prefix_end",
        "on_log",
        "on_step",
        "on_evaluate",
        "on_prefix_end",
        "on_log",
        "on_log",
        "on_train_end",
    ]
    calls = {hook: [values for name, values in record.calls if name == hook] for hook in HOOKS}
    assert calls["on_train_begin"] == [(["a", "b"], 4)]
    assert calls["on_prefix_failed"][0][0] == "bad"
    assert calls["on_prefix_failed"][0][1] == run.failed["bad"]
    assert [values[3].tolist() for values in calls["on_step"]] == [[True, True]] * 3 + [[True, False]]
    step, losses, norms, _ = calls["on_step"][-1]
    assert (step, float(losses[0])) == (4, run.metrics["a"]["loss"])
    assert losses.dtype == norms.dtype == torch.float64
    assert [(values[0], sorted(values[1])) for values in calls["on_evaluate"]] == [
        (0, ["a", "b"]),
        (2, ["a", "b"]),
        (3, ["b"]),
        (4, ["a"]),
    ]
    assert [(n, p is run[n], m is run.metrics[n]) for n, p, m in calls["on_prefix_end"]] == [
        ("b", True, True),
        ("a", True, True),
    ]
    assert [values[0] for values in calls["on_log"]] == [line for line in run.log if "step" in line]
    assert calls["on_train_end"][0][0] is run


def test_several_callbacks_and_subclasses(model):
    class Some(Callback):
        def __init__(self) -> None:
            self.seen = 0

        def on_step(self, step, losses, grad_norms, active):
            self.seen += 1

    first, second = Some(), Some()
    train(model, DATA["a"], callbacks=[first, second], **HOW)
    assert (first.seen, second.seen) == (4, 4)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Callback, "the class Callback; give an object"),
        (3, "int with none"),
        (types.SimpleNamespace(on_steps=print), r"with \['on_steps'\]"),
    ],
)
def test_an_object_without_hooks_is_an_error(model, callback, message):
    with pytest.raises(
        ConfigError, match=rf"callbacks\[0\]: expected an object with some of on_train_begin.*{message}"
    ):
        train(model, DATA["a"], callbacks=[callback], **HOW)


def test_an_error_of_a_callback_ends_the_run_and_restores_the_model():
    model = tiny.make("gpt2").train()

    class Fails:
        def on_log(self, line):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(model, DATA["a"], callbacks=[Fails()], **HOW)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


# ---- reporters ----


class Sent:
    """Fake of wandb's run and of TensorBoard's writer."""

    def __init__(self, *_, **how) -> None:
        Sent.last, self.how, self.lines, self.ended = self, how, [], False

    def log(self, numbers, step):
        self.lines += [(key, value, step) for key, value in numbers.items()]

    def add_scalar(self, key, value, step):
        self.lines.append((key, value, step))

    def finish(self):
        self.ended = True

    close = finish


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_reporters_get_the_log(model, monkeypatch, tmp_path, kind):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Sent))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Sent))
    run = train(model, DATA, eval_data=rows(2, 3), report_to=kind, output_dir=tmp_path, **HOW)
    lines = [line for line in run.log if "step" in line]
    assert ("eval_loss", lines[0]["eval_loss"], 0) in Sent.last.lines
    assert ("loss", lines[1]["loss"], 2) in Sent.last.lines
    assert ("eval_loss_by_prefix/b", lines[-1]["eval_loss_by_prefix"]["b"], 4) in Sent.last.lines
    assert Sent.last.ended


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_missing_library_is_an_error_before_any_work(model, monkeypatch, tmp_path, kind):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=f"pip install {kind}"):
        train(model, DATA, report_to=kind, output_dir=tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()


# ---- plot and report ----


@pytest.fixture(scope="module")
def run(model):
    bad = {"input_ids": [5, 700], "labels": [-100, 700]}
    return train(model, {**DATA, "b|ad\n": [bad]}, eval_data=rows(2, 3), eval_steps=2, **HOW)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_draws_the_curves(run, tmp_path, kind):
    run.plot(tmp_path / "new" / f"losses.{kind}")
    drawn = (tmp_path / "new" / f"losses.{kind}").read_bytes()
    assert drawn.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert len(drawn) > 5000
    assert run._curves("loss") == {
        n: [(line["step"], line["loss_by_prefix"][n]) for line in run.log if "loss" in line] for n in "ab"
    }
    assert run._curves("eval_loss") == {
        n: [(line["step"], line["eval_loss_by_prefix"][n]) for line in run.log if "eval_loss" in line] for n in "ab"
    }


def test_plot_of_many_prefixes_and_of_none(model, tmp_path):
    many = train(model, {str(i): rows(i, 2) for i in range(21)}, **HOW)
    assert list(many._curves("loss")) == [""], "only the mean"
    many.plot(tmp_path / "many.png")
    TrainRun({}, {}, []).plot(tmp_path / "none.png")


def test_plot_errors(run, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="expected a file ending in"):
        run.plot(tmp_path / "losses.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install"):
        run.plot(tmp_path / "losses.png")


def test_report_lists_the_best_prefix_first(run, tmp_path):
    run.report(tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "2 prefixes trained, 1 failed." in lines
    order = [line.split("|")[1].strip() for line in lines if line.startswith(("| a ", "| b "))]
    assert order == sorted(run, key=lambda n: run.metrics[n]["eval_loss"])
    assert f"{run.metrics['a']['eval_loss']:.5g}" in next(line for line in lines if line.startswith("| a "))
    assert any(line.startswith("| b\\|ad | ") and "0 to 100" in line for line in lines)
