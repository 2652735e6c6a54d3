"""Hooks find the base model unchanged, and use what is trained as after the run; dry runs keep one group at a time."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch

import tiny
from prefixfast import generate, load, score, train
from prefixfast.training import loop
from prefixfast.training.callbacks import HOOKS, Callback
from prefixfast.training.estimate import estimate
from prefixfast.training.resilience import gradient_checkpointing
from token_rows import rows

DATA = {"a": rows(0, 4), "b": rows(1, 3)}
HOW = {"batch_size": 2, "max_steps": 2, "learning_rate": 3e-2, "logging_steps": 1}
PREFIX = {"prefix_length": 3, "init": "random"}
METHODS = {"prefix": PREFIX, "embedding": PREFIX, "full": {}, "top2": {}, "adapter": {}, "lora": {}}
WEIGHTS = ("full", "top2", "adapter", "lora")


def use(base, artifact=None):
    return [s.logprob for s in score(DATA["a"], artifact, model=base)]


def texts(base, artifact):
    return [g.token_ids for g in generate([[5, 6], [7]], artifact, model=base, max_new_tokens=3)]


class Uses:
    """Callback that uses the base model, and all that is trained so far, in every hook."""

    def __init__(self, base):
        self.base, self.own, self.made, self.found = base, [], {}, []

    def call(self, hook, values):
        if hook == "on_prefix_end":
            self.made[values[0]] = values[1]
            self.texts = texts(self.base, values[1])
        self.own.append((hook, use(self.base)))
        self.found += [(name, use(self.base, artifact)) for name, artifact in self.made.items()]


for hook in HOOKS:
    setattr(Uses, hook, lambda self, *values, hook=hook: self.call(hook, values))


@pytest.mark.parametrize(
    ("method", "dtype"), [*((m, torch.float32) for m in METHODS), ("top2", torch.bfloat16), ("lora", torch.bfloat16)]
)
def test_hooks_use_the_base_and_what_is_trained_as_after_the_run(method, dtype):
    how = HOW | METHODS[method] | {"method": method, "eval_data": rows(2, 2)}
    with load(tiny.make("gpt2", dtype=dtype)) as base:
        own, uses = use(base), Uses(base)
        plain = train(base, DATA, **how)
        run = train(base, DATA, callbacks=[uses], **how)
        assert {hook for hook, _ in uses.own} == {*HOOKS} - {"on_prefix_failed"}
        assert all(found == own for _, found in uses.own)
        after = {name: use(base, artifact) for name, artifact in run.items()}
        assert after["a"] != own
        assert uses.texts == texts(base, run["b"])
        assert all(found == after[name] for name, found in uses.found)
        assert {name for name, _ in uses.found} == {"a", "b"}
        assert [w.digest for w in run.values()] == [w.digest for w in plain.values()], "hooks change no result"


@pytest.mark.parametrize("method", WEIGHTS)
def test_the_hook_of_a_failure_finds_the_base_unchanged(method, monkeypatch):
    found = []

    def fails(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(loop.OutputDir, "save_prefix", fails)

    class Failure:
        def on_prefix_failed(self, name, error):
            found.append(use(base))

    with load(tiny.make("gpt2")) as base:
        own = use(base)
        train(base, DATA, method=method, callbacks=[Failure()], **HOW)
        assert found == [own, own]


def test_weights_stay_in_the_base_from_step_to_step_without_a_hook(monkeypatch):
    """The empty hooks of `Callback`, which do nothing, take nothing out either."""

    class AtEnd(Callback):
        def on_train_end(self, run):
            pass

    entered, applied = [], loop.Applied.put_in

    def put_in(self):
        entered.append(not self._is_in)
        applied(self)

    monkeypatch.setattr(loop.Applied, "put_in", put_in)
    train(tiny.make("gpt2"), DATA["a"], method="lora", callbacks=[AtEnd()], **HOW)
    assert len(entered) >= HOW["max_steps"]
    assert sum(entered) == 1


@pytest.mark.parametrize(
    "how", [{"method": "full"}, {"method": "lora"}, {"init": "random", "sweep": {"max_length": [30, 40, 50]}}]
)
def test_a_dry_run_frees_each_group_before_the_next(how, monkeypatch):
    made, make = [], loop.make

    def recorded(data):
        assert all(kept() is None for kept in made)
        trained = make(data)
        made.extend(weakref.ref(t.tensor) for t in trained.params)
        return trained

    monkeypatch.setattr(loop, "make", recorded)
    data = {name: rows(i, 3 + i) for i, name in enumerate("abc")}
    found = estimate(tiny.make("gpt2"), data, batch_size=2, max_steps=5, **how)
    assert len(made) >= 3
    groups, names = (3, 3) if "method" in how else (3, 9)
    assert (found.prefixes, found.steps) == (names, 5 * groups)
    counts = [(len(r["input_ids"]), 1) for of_name in data.values() for r in of_name]
    assert (found.tokens, found.examples) == tuple(map(sum, zip(*counts, strict=True)))


def test_a_dry_run_of_a_text_has_no_memory_of_training():
    found = estimate(tiny.make("gpt2"), DATA["a"], method="icl", num_examples=2)
    assert (found.trained_numbers, found.training_bytes) == (0, 0)
    assert found.stored_bytes > 0


def test_gradient_checkpointing_of_two_runs_is_undone_by_the_last():
    with load(tiny.make("llama")) as base:
        before = [vars(m).get("forward") for m in base.hf.modules()]
        first, second = contextlib.ExitStack(), contextlib.ExitStack()
        for run in (first, second):
            run.enter_context(gradient_checkpointing(base, True))
        patched = [vars(m).get("forward") for m in base.hf.modules()]
        first.close()
        assert [vars(m).get("forward") for m in base.hf.modules()] == patched != before
        second.close()
        assert [vars(m).get("forward") for m in base.hf.modules()] == before
