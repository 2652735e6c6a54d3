"""Prefixes of a run with a store are read from it, so that memory does not grow with their number."""

from __future__ import annotations

import gc
import itertools
import os
import signal

import pytest
import torch

import prefixfast
import tiny
from prefixfast import DataError, Prefix, PrefixStore

ROWS = [{"prompt": "a", "completion": "b"}]


@pytest.fixture
def base(tokenizer):
    with prefixfast.load(tiny.make("gpt2"), tokenizer=tokenizer) as model:
        yield model


def num_prefixes() -> int:
    gc.collect()
    return sum(isinstance(x, Prefix) for x in gc.get_objects())


def train(base, count: int, **options):
    data = {f"user{i}": ROWS for i in range(count)}
    return prefixfast.train(base, data, prefix_length=2, max_steps=1, progress=False, **options)


@pytest.mark.parametrize("count", [3, 80])
def test_a_run_with_a_store_holds_no_prefixes(base, tmp_path, count):
    before = num_prefixes()
    run = train(base, count, store=tmp_path / "store")
    assert num_prefixes() == before
    assert len(run) == len(PrefixStore(tmp_path / "store")) == count
    again = train(base, count, store=tmp_path / "store", resume=True)
    assert num_prefixes() == before
    assert len(again.unchanged) == count
    assert again.metrics == run.metrics
    assert again["user1"].digest == run["user1"].digest


def test_a_run_without_a_store_holds_them(base):
    before = num_prefixes()
    run = train(base, 3)
    assert num_prefixes() == before + 3
    assert run["user0"] is run["user0"]


def test_prefixes_of_the_store_are_those_that_were_trained(base, tmp_path):
    seen = {}

    class Watch:
        def on_prefix_end(self, name: str, prefix: Prefix, metrics: dict[str, float]) -> None:
            seen[name] = prefix.digest

    run = train(base, 70, store=tmp_path / "store", callbacks=[Watch()])
    assert list(seen) == list(run)
    assert {name: prefix.digest for name, prefix in run.items()} == seen


def test_a_later_version_does_not_replace_that_of_the_run(base, tmp_path):
    store = PrefixStore(tmp_path / "store", keep_versions=2)
    run = train(base, 2, store=store)
    digest = run["user0"].digest
    store.put("user0", run["user1"])
    assert run["user0"].digest == digest
    store.delete("user0")
    with pytest.raises(DataError):
        run["user0"]


def test_only_the_prefix_whose_save_fails_has_failed(base, tmp_path, monkeypatch):
    put = PrefixStore.put

    def full(self, name, prefix):
        if name in ("user1", "user66"):
            raise OSError(28, "No space left on device")
        return put(self, name, prefix)

    monkeypatch.setattr(PrefixStore, "put", full)
    run = train(base, 70, store=tmp_path / "store")
    assert set(run.failed) == {"user1", "user66"}
    assert len(run) == len(PrefixStore(tmp_path / "store")) == 68


@pytest.mark.parametrize("save_steps", [None, 2])
def test_a_run_killed_between_saves_keeps_each_saved_prefix(base, tmp_path, save_steps):
    """70 prefixes end together at step 3: the process dies while a part of them is saved."""
    data, killed_at = {f"user{i}": ROWS for i in range(70)}, 40
    how = {"prefix_length": 2, "max_steps": 3, "save_steps": save_steps, "progress": False, "resume": True}
    expected = dict(prefixfast.train(base, data, **how, store=tmp_path / "whole"))
    folder, put, num_put = tmp_path / "store", PrefixStore.put, itertools.count()
    if (pid := os.fork()) == 0:

        def put_or_die(self, name, prefix):
            if next(num_put) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return put(self, name, prefix)

        PrefixStore.put = put_or_die
        prefixfast.train(base, data, **how, store=folder)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    saved = set(PrefixStore(folder))
    assert 0 < len(saved) < 70
    steps = StepsByName()
    prefixfast.train(base, data, **how, store=folder, callbacks=[steps])
    store = PrefixStore(folder)
    assert set(store) == set(data)
    assert all(len(store.versions(name)) == 1 for name in store)
    if save_steps:  # all go on from the checkpoint before the last step
        assert steps.taken == {name: [3] for name in data}
        assert all(store[name].digest == expected[name].digest for name in data)
    else:
        assert steps.taken == {name: [1, 2, 3] for name in data if name not in saved}
        for name in data:  # batches of fewer prefixes round in another way
            torch.testing.assert_close(store[name].kv, expected[name].kv, atol=1e-5, rtol=1e-5)


class StepsByName:
    """Steps that each prefix has taken."""

    def __init__(self) -> None:
        self.taken: dict[str, list[int]] = {}

    def on_train_begin(self, names, steps):
        self.names = names

    def on_step(self, step, losses, grad_norms, active):
        for name, now in zip(self.names, active.tolist(), strict=True):
            if now:
                self.taken.setdefault(name, []).append(step)
