"""Lines of training, generation and scoring without a terminal, written at times that the test sets."""

from __future__ import annotations

import io
import re
import sys

import pytest

import prefixfast
import tiny
from prefixfast import PrefixStore
from prefixfast.io import progress as module
from prefixfast.io.progress import Progress
from prefixfast.training.callbacks import Callback
from token_rows import rows

HOW = {"batch_size": 2, "prefix_length": 2, "init": "random", "reparameterization": "none", "max_steps": 3}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2")) as loaded:
        yield loaded


@pytest.fixture
def due(monkeypatch):
    """Make a line due after each counted unit, written by the thread that works; returns standard error."""
    original = Progress.update

    def update(self, count=1, **amounts):
        original(self, count, **amounts)
        self._last = self.clock() - module.LINE_SECONDS
        self.tick()

    def start():
        monkeypatch.setattr(Progress, "update", update)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        return sys.stderr

    return start


def test_training_says_step_loss_rates_and_time_left(model, due):
    err = due()
    prefixfast.train(model, rows(0, 6), **HOW)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("train: ")]
    number = r"[\d.e+-]+"
    pattern = rf"train: 1 of 3 steps, loss \d\.\d+, {number} rows/s, {number} tokens/s, .* left"
    assert re.fullmatch(pattern, lines[0]), lines[0]
    assert lines[-1].startswith("train: 3 of 3 steps, loss ")
    assert "finished after" in lines[-1]


def test_training_of_several_says_how_many_have_ended_and_failed(model, due):
    data = {"a": rows(0, 4), "b": rows(1, 4), "c": rows(2, 4)}
    err = due()
    prefixfast.train(model, data, overrides={"a": {"max_steps": 1}}, eval_data=rows(3, 5), **HOW)
    assert "1 of 3 prefixes finished" in err.getvalue()
    assert "evaluate: " in err.getvalue()
    assert "tokenize: 8 of 12 rows" in err.getvalue()


def test_the_rows_of_the_rate_are_rows_and_not_examples(folder):
    seen = []

    class See(Callback):
        def on_step(self, step, losses, grad_norms, active):
            seen.append(module._current.get())

    own = [{"mr": "name[a]", "refs": ["bc", "de"]}, {"mr": "name[b]", "refs": ["cd", "ef"]}]
    how = {"task": "e2e", "callbacks": [See()], "dtype": "float32", "progress": False, **HOW}
    prefixfast.train(str(folder), own, **how)
    assert seen[0].label == "train"
    assert seen[0].amounts["rows"] == pytest.approx(3)  # 3 steps of 2 examples, which are one row each
    prefixfast.train(str(folder), {"a": own, "b": [dict(row) for row in own]}, **how)  # which share examples
    assert seen[-1].amounts["rows"] == pytest.approx(6)


def test_generation_and_scores_say_requests_and_tokens(model, due, make_prefix):
    prefix = make_prefix()
    err = due()
    with prefixfast.Engine(model, max_num_seqs=2) as engine:
        engine.generate([[5, 6]] * 4, prefix, max_new_tokens=3, min_new_tokens=3)
        engine.score([[5, 6]] * 4, prefix, targets=[[7]] * 4)
        engine.submit([5, 6], prefix, max_new_tokens=2).result()
        engine.generate([[5, 6]] * 3, prefix, max_new_tokens=3)
    text = err.getvalue()
    assert re.search(r"generate: 2 of 4 requests, \S+ tokens/s, .* left", text), text
    assert re.search(r"generate: 4 of 4 requests, \S+ tokens/s, finished", text)
    assert re.search(r"score: 4 of 4 requests, \S+ tokens/s, finished", text)
    assert re.search(r"generate: 3 of 3 requests, \S+ tokens/s, finished", text), "also through the engine's thread"


@pytest.mark.parametrize("call", ["train", "generate", "score"])
def test_progress_false_is_silent(model, due, make_prefix, call):
    prefix, err = make_prefix(), due()
    if call == "train":
        prefixfast.train(model, rows(0, 6), progress=False, **HOW)
    elif call == "generate":
        prefixfast.generate([[5, 6]], prefix, model=model, max_new_tokens=2, progress=False)
    else:
        prefixfast.score([[5, 6]], prefix, targets=[[7]], model=model, progress=False)
    assert err.getvalue() == ""


def test_stores_say_what_they_read_and_write(tmp_path, due, make_prefix):
    store = PrefixStore(tmp_path / "store")
    for i in range(3):
        store.put(f"user{i}", make_prefix(seed=i))
    err = due()
    store.export_dir(tmp_path / "out")
    PrefixStore(tmp_path / "other").import_dir(tmp_path / "out")
    store.verify()
    text = err.getvalue()
    for line in ("export: 2 of 3 prefixes", "import: 2 of 3 folders", "verify: 2 of 3 versions"):
        assert line in text
