"""`PrefixTrainer` gives the prefix of `train`, with callbacks, reports and checkpoints of the `Trainer`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import seq2seq
import tiny
from prefixfast import ConfigError, Prefix, PrefixTrainer, load, score, train
from token_rows import rows

DATA, HELD_OUT = rows(0, 7), rows(1, 4)
RATE, EPOCHS = 0.05, 3
START: dict[str, Any] = {"prefix_length": 4, "init": "random", "reparameterization": "none"}


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    """Arguments with a batch of 3 rows, of which the last one of an epoch is smaller."""
    given = {
        "per_device_train_batch_size": 3,
        "num_train_epochs": EPOCHS,
        "learning_rate": RATE,
        "weight_decay": 0.02,
        "warmup_steps": 2,
        "seed": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **fields,
    }
    return TrainingArguments(str(folder), **given)


def trained(model: Any = None, *, batch_size: int = 3, **fields: Any) -> Prefix:
    """Prefix of `train` with the same options."""
    options = {**START, "num_train_epochs": EPOCHS, "learning_rate": RATE, "seed": 5, **fields}
    model = tiny.make("llama", dtype=torch.float64) if model is None else model
    return train(model, DATA, batch_size=batch_size, weight_decay=0.02, warmup_steps=2, **options)


def unlike(a: Prefix, b: Prefix) -> float:
    assert [*a.kv] == [*b.kv]
    return max(float((a.kv[n] - b.kv[n]).abs().max()) for n in a.kv)


class Recorder(TrainerCallback):
    """Names of the events in their order, losses, and the steps at which a prefix was saved."""

    def __init__(self, stop_after: int = 0):
        self.events: list[str] = []
        self.losses: list[float] = []
        self.stop_after = stop_after

    def on_train_begin(self, args, state, control, **_):
        self.events.append("begin")

    def on_log(self, args, state, control, logs, **_):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.stop_after

    def on_evaluate(self, args, state, control, metrics, **_):
        self.events.append(f"evaluate {state.global_step}")

    def on_save(self, args, state, control, **_):
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **_):
        self.events.append("end")


@pytest.mark.parametrize(
    ("of_trainer", "of_prefix", "of_train"),
    [
        ({}, {}, {}),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}, {"batch_size": 4}),
        ({"train_sampling_strategy": "sequential", "max_steps": 4}, {}, {"shuffle": False, "max_steps": 4}),
        ({}, {"prefix_dropout": 0.3, "frozen_rows": 1}, {}),
        pytest.param(
            {"learning_rate": 1e-3},
            {"reparameterization": "mlp", "init": "zero"},
            {"learning_rate": 1e-3},
            marks=pytest.mark.long,
        ),
        pytest.param({}, {"position": "infix", "layers": [0, 2]}, {}, marks=pytest.mark.long),
    ],
)
def test_the_prefix_is_that_of_train(tmp_path, of_trainer, of_prefix, of_train):
    expected = trained(**of_prefix, **of_train)
    how, model, seen = {**START, **of_prefix}, tiny.make("llama", dtype=torch.float64), Recorder()
    flags = [(n, p.requires_grad, m) for (n, p), m in zip(model.named_parameters(), model.modules(), strict=False)]
    args = arguments(tmp_path, **of_trainer)
    with PrefixTrainer(model, args, DATA, HELD_OUT, callbacks=[seen], **how) as trainer:
        result = trainer.train()
        found = trainer.evaluate()["eval_loss"]
        prefix = trainer.prefix
        scores = score(HELD_OUT, prefix, model=trainer.base)
    assert unlike(prefix, expected) < 1e-9
    assert result.global_step == expected.training["metrics"]["steps"]
    assert seen.losses[-1] == pytest.approx(expected.training["metrics"]["loss"], rel=1e-6)  # logged in fp32
    mean = -sum(s.logprob for s in scores) / sum(len(s.token_ids) for s in scores)
    assert found == pytest.approx(mean, rel=1e-9)
    assert prefix.base == expected.base
    assert [
        (n, p.requires_grad, m) for (n, p), m in zip(model.named_parameters(), model.modules(), strict=False)
    ] == flags


@pytest.mark.long
def test_an_encoder_decoder_base(tmp_path):
    texts = [[3 + i % 90 for i in r["input_ids"]] for r in DATA]
    data = [{"input_ids": ids, "labels": ids[::-1]} for ids in texts]
    how = {"prefix_length": 3, "init": "random", "reparameterization": "none"}
    one, two = (seq2seq.make_seq2seq("bart").double() for _ in range(2))
    expected = train(one, data, batch_size=3, max_steps=4, learning_rate=RATE, seed=5, **how)
    args = arguments(tmp_path, max_steps=4, weight_decay=0.0, warmup_steps=0)
    with PrefixTrainer(two, args, data, **how) as trainer:
        trainer.train()
        assert unlike(trainer.prefix, expected) < 1e-9


@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.long), 4]
)  # after an epoch, and inside the next one
def test_a_run_that_goes_on_from_a_checkpoint_equals_an_uninterrupted_one(tmp_path, step):
    how = {**START, "prefix_dropout": 0.2}
    with PrefixTrainer(tiny.make("llama"), arguments(tmp_path / "whole"), DATA, **how) as trainer:
        trainer.train()
        whole = trainer.prefix
    args = arguments(tmp_path / "cut", save_strategy="steps", save_steps=step)
    with PrefixTrainer(tiny.make("llama"), args, DATA, callbacks=[Recorder(stop_after=step)], **how) as trainer:
        trainer.train()
        cut = trainer.prefix
    with PrefixTrainer(tiny.make("llama"), args, DATA, **how) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3 * EPOCHS
        assert trainer.prefix.digest == whole.digest != cut.digest
    kept = Prefix.from_pretrained(tmp_path / "cut" / f"checkpoint-{step}")
    assert (kept.digest, kept.training["metrics"]["steps"]) == (cut.digest, step)


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.long), {"prefix_dropout": 0.2}])
def test_a_run_that_is_interrupted_inside_a_step_begins_the_step_again(tmp_path, options):
    class Interrupt(TrainerCallback):
        count = 0

        def on_substep_end(self, args, state, control, **_):
            self.count += 1
            if self.count == 2:
                raise KeyboardInterrupt

    how, fields = {**START, **options}, {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with PrefixTrainer(tiny.make("llama"), arguments(tmp_path / "whole", **fields), DATA, **how) as trainer:
        trainer.train()
        whole = trainer.prefix
    args = arguments(tmp_path / "cut", **fields)
    with PrefixTrainer(tiny.make("llama"), args, DATA, callbacks=[Interrupt()], **how) as trainer:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train(resume_from_checkpoint=True)
        assert trainer.prefix.digest == whole.digest


def test_the_best_checkpoint_early_stopping_and_the_order_of_events(tmp_path):
    seen = Recorder()
    args = arguments(
        tmp_path,
        learning_rate=0.5,
        num_train_epochs=20,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    callbacks = [seen, EarlyStoppingCallback(early_stopping_patience=2)]
    with PrefixTrainer(tiny.make("llama"), args, DATA, HELD_OUT, callbacks=callbacks, **START) as trainer:
        trainer.train()
        losses = {x["step"]: x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x}
        best = min(losses, key=losses.get)
        assert best < max(losses) < 60
        kept = Prefix.from_pretrained(tmp_path / f"checkpoint-{best}")
        assert unlike(trainer.prefix, kept) == 0
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
        trainer.save_model(tmp_path / "best")
    assert unlike(Prefix.from_pretrained(tmp_path / "best"), kept) == 0
    assert seen.events[:4] == ["begin", "evaluate 3", "save 3", "evaluate 6"]
    assert "end" in seen.events


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    args = arguments(tmp_path / "out", report_to="tensorboard")
    with PrefixTrainer(tiny.make("llama"), args, DATA, HELD_OUT, **START) as trainer:
        trainer.train()
        trainer.evaluate()
    (folder,) = {p.parent for p in (tmp_path / "tb").rglob("events*")}
    found = EventAccumulator(str(folder)).Reload()
    assert len(found.Scalars("train/loss")) == 3 * EPOCHS
    assert "eval/loss" in found.Tags()["scalars"]


def test_weights_and_biases(tmp_path, monkeypatch):
    """The callback of transformers with a module in the place of the library."""
    logged: list[dict[str, Any]] = []
    run = SimpleNamespace(_label=lambda **_: None, id="1", name="run", url="", disabled=False, summary={})
    fake = SimpleNamespace(
        run=None,
        config=SimpleNamespace(update=lambda *_, **__: None),
        init=lambda **_: setattr(fake, "run", run),
        log=logged.append,
        define_metric=lambda *_, **__: None,
        finish=lambda: None,
    )
    errors = SimpleNamespace(ConfigError=KeyError)
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, fake if name == "wandb" else errors)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    how = {"callbacks": [integration_utils.WandbCallback], **START}
    with PrefixTrainer(tiny.make("llama"), arguments(tmp_path), DATA, HELD_OUT, **how) as trainer:
        trainer.train()
        trainer.evaluate()
    assert sum("train/loss" in line for line in logged) == 3 * EPOCHS
    assert any("eval/loss" in line for line in logged)


def test_what_has_no_right_effect_is_refused(tmp_path):
    model = tiny.make("llama")
    wrong: dict[str, Any] = {
        "bf16": {"args": arguments(tmp_path, bf16=True)},
        "gradient_checkpointing": {"args": arguments(tmp_path, gradient_checkpointing=True)},
        "label_smoothing_factor": {"args": arguments(tmp_path, label_smoothing_factor=0.1)},
        "train_sampling_strategy": {"args": arguments(tmp_path, train_sampling_strategy="group_by_length")},
        "push_to_hub": {"args": arguments(tmp_path, push_to_hub=True)},
        "TrainingArguments": {"args": {"learning_rate": 1e-3}},
        "rows by name": {"train_dataset": {"a": DATA, "b": DATA}},
        "unknown option": {"lora_rank_": 3},
    }
    for words, fields in wrong.items():
        with pytest.raises(ConfigError, match=words):
            PrefixTrainer(**{"model": model, "args": arguments(tmp_path), "train_dataset": DATA, **START, **fields})
    with load(model) as base, PrefixTrainer(base, arguments(tmp_path), DATA, **START) as trainer:
        for call in (trainer.evaluate, lambda: trainer.evaluate(HELD_OUT), lambda: trainer.predict(DATA)):
            with pytest.raises(ConfigError):
                call()
    assert not base.closed or base.handle is not None


def test_the_default_rate_of_the_arguments_is_warned_of(tmp_path, caplog):
    with PrefixTrainer(tiny.make("llama"), arguments(tmp_path, learning_rate=5e-5), DATA, **START):
        assert "5e-05" in caplog.text
    caplog.clear()
    with PrefixTrainer(tiny.make("llama"), arguments(tmp_path), DATA, **START):
        assert "5e-05" not in caplog.text
