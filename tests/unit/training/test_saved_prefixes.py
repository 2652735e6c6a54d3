"""Prefixes of a run with a store are read from it, so that memory does not grow with their number."""

from __future__ import annotations

import gc

import pytest

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
