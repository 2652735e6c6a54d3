"""Prefixes in the arena by hand and by budget: pins, eviction with zeros, digests instead of names, versions of running requests."""

import pytest
import torch

from prefixfast import Engine, PrefixStore
from prefixfast.errors import BaseMismatchError, CapacityError, UnknownPrefixError

HOW = {"max_num_seqs": 4, "max_model_len": 64}


def rows_of(engine, digest):
    number = engine.loop.residency.numbers.get(digest)
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
            assert len(found) <= 3, "the budget is three prefixes"
            assert [r.name for r in found if r.pinned] == ["user 0"]
        assert [r.name for r in found] == ["user 0", "user 4", "user 5"]
        assert found[0].nbytes == 16 * row
        engine.unpin("user 0")
        engine.generate([[5, 6]], "user 3", max_new_tokens=2)
        assert "user 0" not in [r.name for r in engine.resident()]
        assert engine.stats()["evictions"] > 0


def test_a_prefix_beyond_the_budget_is_refused(base, store, make_prefix):
    row = 2 * 4 * 8 * 4 * 3
    with Engine(base, store=store, prefix_memory=2 * 16 * row, **HOW) as engine:
        with pytest.raises(CapacityError, match="prefix_memory"):
            engine.generate([[5]], make_prefix(9, length=33), max_new_tokens=1)
        assert engine.generate([[5]], [["user 0", "user 1"]], max_new_tokens=1)[0].usage["prefix_rows"] == 32


def test_an_evicted_prefix_leaves_zeros(base, store):
    with Engine(base, store=store, **HOW) as engine:
        for kv in engine.loop.arena.layers:
            for t in kv:
                t.zero_()
        (before,) = engine.generate([[5, 6]], "user 1", max_new_tokens=3)
        digest, number = store.info("user 1").digest, engine.loop.residency.numbers[store.info("user 1").digest]
        start = rows_of(engine, digest)
        assert all(bool(t[start : start + 16].any()) for kv in engine.loop.arena.layers for t in kv)
        assert engine.evict("user 1") is True
        assert all(not bool(t[start : start + 16].any()) for kv in engine.loop.arena.layers for t in kv)
        assert rows_of(engine, digest) is None
        assert number not in engine.loop.residency.loader.host or not engine.loop.residency.loader.jobs.empty()
        assert engine.resident() == []
        assert engine.evict("user 1") is True, "nothing is left to do"
        assert engine.evict(digest) is True
        assert engine.generate([[5, 6]], "user 1", max_new_tokens=3)[0].token_ids == before.token_ids, (
            "it is read again"
        )


def test_a_prefix_in_use_goes_when_its_last_request_has_ended(base, store, make_prefix):
    with Engine(base, store=store, **HOW) as engine:
        (expected,) = engine.generate([[5, 6]], "user 2", max_new_tokens=40, min_new_tokens=40)
        ticket = engine.submit([5, 6], "user 2", max_new_tokens=40, min_new_tokens=40)
        digest = store.info("user 2").digest
        done = engine.evict("user 2")
        assert ticket.result(60).token_ids == expected.token_ids, "a running request keeps its prefix"
        engine.submit([7], max_new_tokens=1).result(60)
        assert rows_of(engine, digest) is None
        assert done is False or ticket.done()


def test_a_running_request_finishes_on_the_version_it_began_with(base, store, make_prefix):
    with Engine(base, store=store, **HOW) as engine:
        (old,) = engine.generate([[5, 6]], "user 3", max_new_tokens=40, min_new_tokens=40)
        ticket = engine.submit([5, 6], "user 3", max_new_tokens=40, min_new_tokens=40)
        store.put("user 3", make_prefix(77, length=16))
        (new,) = engine.generate([[5, 6]], "user 3", max_new_tokens=40, min_new_tokens=40)
        assert ticket.result(60).token_ids == old.token_ids
        assert new.token_ids != old.token_ids
        assert new.prefix_digest == store.info("user 3").digest != old.prefix_digest


def test_one_name_never_serves_anothers_prefix(base, store, make_prefix):
    same = make_prefix(0, length=16)
    with Engine(base, store=store, **HOW) as engine:
        given = engine.generate([[5, 6]], same, max_new_tokens=3)[0]
        named = engine.generate([[5, 6]], "user 0", max_new_tokens=3)[0]
        assert given.prefix_digest == named.prefix_digest
        assert engine.stats()["loads"] == 1, "equal content is one resident"


def test_pins_say_what_is_wrong(base, store, make_prefix):
    with Engine(base, store=store, **HOW) as engine:
        with pytest.raises(UnknownPrefixError, match="nobody"):
            engine.pin("nobody")
        with pytest.raises(BaseMismatchError):
            engine.pin(make_prefix(dim=4))
        engine.unpin("user 0")
        assert engine.evict("0" * 64) is True, "what nobody knows is gone"


def test_prefixes_kept_in_bf16_are_rounded(base, store):
    with Engine(base, store=store, prefix_dtype="bfloat16", **HOW) as engine:
        engine.generate([[5, 6]], "user 0", max_new_tokens=1)
        start = rows_of(engine, store.info("user 0").digest)
        k = engine.loop.arena.layers[0][0][start : start + 16]
        assert torch.equal(k, store["user 0"].kv["self.0.k"].bfloat16().float())
        assert not torch.equal(k, store["user 0"].kv["self.0.k"])
