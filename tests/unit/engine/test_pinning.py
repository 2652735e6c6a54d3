"""Pinned and evicted prefixes, the memory limit of prefixes, and versions of prefixes in running requests."""

import pytest
import torch

from prefixfast import Engine, PrefixStore
from prefixfast.errors import BaseMismatchError, CapacityError, UnknownPrefixError

HOW = {"max_num_seqs": 4, "max_model_len": 64}


def first_row(engine, digest):
    number = engine.loop.prefix_cache.numbers.get(digest)
    return None if number is None else engine.loop.scheduler.prefix_state(number)[0]


@pytest.fixture
def store(tmp_path, make_prefix):
    store = PrefixStore(tmp_path / "store")
    for i in range(6):
        store.put(f"user {i}", make_prefix(i, length=16))
    return store


def test_a_pinned_prefix_is_loaded_and_stays(base, store):
    row = 2 * 4 * 8 * 4 * 3
    with Engine(base, store=store, prefix_memory=3 * 16 * row, **HOW) as engine:
        engine.pin("user 0")
        for _ in range(50):
            engine.generate([[5]], max_new_tokens=1)
            if engine.resident():
                break
        for i in range(1, 6):
            engine.generate([[5, 6]], f"user {i}", max_new_tokens=2)
            found = engine.resident()
            assert len(found) <= 3, "prefix_memory is that of three prefixes"
            assert [r.name for r in found if r.pinned] == ["user 0"]
        assert [r.name for r in found] == ["user 0", "user 4", "user 5"]
        assert found[0].nbytes == 16 * row
        engine.unpin("user 0")
        engine.generate([[5, 6]], "user 3", max_new_tokens=2)
        assert "user 0" not in [r.name for r in engine.resident()]
        assert engine.stats()["evictions"] > 0


def test_a_prefix_beyond_prefix_memory_is_refused(base, store, make_prefix):
    row = 2 * 4 * 8 * 4 * 3
    with Engine(base, store=store, prefix_memory=2 * 16 * row, **HOW) as engine:
        with pytest.raises(CapacityError, match="prefix_memory"):
            engine.generate([[5]], make_prefix(9, length=33), max_new_tokens=1)
        assert engine.generate([[5]], [["user 0", "user 1"]], max_new_tokens=1)[0].usage["prefix_rows"] == 32


def test_the_rows_of_an_evicted_prefix_are_zero(base, store):
    with Engine(base, store=store, **HOW) as engine:
        for kv in engine.loop.arena.layers:
            for t in kv:
                t.zero_()
        (before,) = engine.generate([[5, 6]], "user 1", max_new_tokens=3)
        digest, number = store.info("user 1").digest, engine.loop.prefix_cache.numbers[store.info("user 1").digest]
        start = first_row(engine, digest)
        assert all(bool(t[start : start + 16].any()) for kv in engine.loop.arena.layers for t in kv)
        assert engine.evict("user 1") is True
        assert all(not bool(t[start : start + 16].any()) for kv in engine.loop.arena.layers for t in kv)
        assert first_row(engine, digest) is None
        loader = engine.loop.prefix_cache.loader
        assert number not in loader.host_cache or loader.jobs.loads
        assert engine.resident() == []
        assert engine.evict("user 1") is True, "the prefix is gone already"
        assert engine.evict(digest) is True
        assert engine.generate([[5, 6]], "user 1", max_new_tokens=3)[0].token_ids == before.token_ids, (
            "the prefix is read again"
        )


def test_a_prefix_in_use_is_evicted_when_its_last_request_has_ended(base, store, make_prefix):
    with Engine(base, store=store, **HOW) as engine:
        (expected,) = engine.generate([[5, 6]], "user 2", max_new_tokens=40, min_new_tokens=40)
        ticket = engine.submit([5, 6], "user 2", max_new_tokens=40, min_new_tokens=40)
        digest = store.info("user 2").digest
        done = engine.evict("user 2")
        assert ticket.result(60).token_ids == expected.token_ids, "a running request keeps its prefix"
        engine.submit([7], max_new_tokens=1).result(60)
        assert first_row(engine, digest) is None
        assert done is False or ticket.done()


def test_a_running_request_keeps_its_version_of_a_prefix(base, store, make_prefix):
    with Engine(base, store=store, **HOW) as engine:
        (old,) = engine.generate([[5, 6]], "user 3", max_new_tokens=40, min_new_tokens=40)
        ticket = engine.submit([5, 6], "user 3", max_new_tokens=40, min_new_tokens=40)
        store.put("user 3", make_prefix(77, length=16))
        (new,) = engine.generate([[5, 6]], "user 3", max_new_tokens=40, min_new_tokens=40)
        assert ticket.result(60).token_ids == old.token_ids
        assert new.token_ids != old.token_ids
        assert new.prefix_digest == store.info("user 3").digest != old.prefix_digest


def test_equal_prefixes_are_loaded_once(base, store, make_prefix):
    same = make_prefix(0, length=16)
    with Engine(base, store=store, **HOW) as engine:
        by_object = engine.generate([[5, 6]], same, max_new_tokens=3)[0]
        by_name = engine.generate([[5, 6]], "user 0", max_new_tokens=3)[0]
        assert by_object.prefix_digest == by_name.prefix_digest
        assert engine.stats()["loads"] == 1, "prefixes of equal content share their rows"


def test_wrong_pins_are_refused(base, store, make_prefix):
    with Engine(base, store=store, **HOW) as engine:
        with pytest.raises(UnknownPrefixError, match="nobody"):
            engine.pin("nobody")
        with pytest.raises(BaseMismatchError):
            engine.pin(make_prefix(dim=4))
        with pytest.raises(UnknownPrefixError, match=r"did you mean .*user 1"):
            engine.evict("usr 1")
        engine.unpin("user 0")
        assert engine.evict("0" * 64) is True, "an unknown prefix is gone already"


def test_prefixes_in_bf16_host_memory_are_rounded(base, store):
    with Engine(base, store=store, prefix_dtype="bfloat16", **HOW) as engine:
        engine.generate([[5, 6]], "user 0", max_new_tokens=1)
        start = first_row(engine, store.info("user 0").digest)
        k = engine.loop.arena.layers[0][0][start : start + 16]
        assert torch.equal(k, store["user 0"].kv["self.0.k"].bfloat16().float())
        assert not torch.equal(k, store["user 0"].kv["self.0.k"])
