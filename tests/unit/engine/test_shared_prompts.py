"""Shared leading tokens of prompts are computed once and do not change results."""

import asyncio
import threading
import time

import numpy as np
import pytest

import tiny
from mixes import prefixes_of
from prefixfast import Engine
from prefixfast.engine import shared_prompts as shared

G = np.random.default_rng(4)
LEAD, OTHER = G.integers(3, tiny.VOCAB, 40).tolist(), G.integers(3, tiny.VOCAB, 30).tolist()
BATCH = [[*LEAD, 5, 6], [*LEAD, 7], [*LEAD, 8, 9, 10], [*OTHER, 5], OTHER, [*OTHER, 6, 7], [3, 4], [*LEAD[:20], 5]]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("with_prefixes", [False, True])
def test_shared_prompts_give_the_same_with_fewer_prompt_tokens(family, with_prefixes):
    base = tiny.make(family)
    own = prefixes_of(base, 3)
    chosen = (
        [[own[1], own[2]] if i % 3 else [own[3]] if i else None for i in range(len(BATCH))] if with_prefixes else None
    )
    batch = BATCH * 2
    chosen = chosen * 2 if chosen else None
    how = {"max_new_tokens": 8, "num_beams": 2}
    size = {"max_num_seqs": 16, "max_model_len": 64}
    with Engine(base, **size) as engine:
        expected = engine.generate(batch, chosen, **how)
        plain = engine.stats()["prefill_tokens"]
    with Engine(base, **size, share_prompts=16) as engine:
        for _ in range(2):
            got = engine.generate(batch, chosen, **how)
            assert [g.token_ids for g in got] == [g.token_ids for g in expected]
            assert [(g.usage, g.prefix_digest) for g in got] == [(g.usage, g.prefix_digest) for g in expected]
        assert engine.stats()["prefill_tokens"] < plain
        known = len(engine.requests.shared_prompts.prompts)
        ticket = engine.submit(batch[0], None if chosen is None else chosen[0], **how)
        assert ticket.result(60).token_ids == expected[0].token_ids
        assert len(engine.requests.shared_prompts.prompts) == known > 0


def test_short_or_unshared_prompts_are_not_cached():
    with Engine(tiny.make("gpt2"), max_num_seqs=16, max_model_len=64, share_prompts=16) as engine:
        engine.generate([[3, 4, 5]] * 4 + [LEAD], max_new_tokens=2)
        assert not engine.requests.shared_prompts.prompts
        engine.generate([LEAD, LEAD], max_new_tokens=2)
        ((_, text),) = engine.requests.shared_prompts.prompts
        assert len(text) == 4 * (len(LEAD) - 1), "one token of the shortest prompt is not shared"


def test_shared_prompts_are_computed_in_the_thread_that_owns_the_model(monkeypatch):
    threads = []
    original = shared.text_kv
    monkeypatch.setattr(
        shared,
        "text_kv",
        lambda *args, **how: (threads.append(threading.current_thread().name), original(*args, **how))[1],
    )
    with Engine(tiny.make("gpt2"), max_num_seqs=16, max_model_len=64, share_prompts=16) as engine:
        engine.submit([3, 4], max_new_tokens=2).result(60)
        engine.generate([LEAD, LEAD], max_new_tokens=2)
        monkeypatch.setattr(shared, "text_kv", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([OTHER, OTHER], max_new_tokens=2)
        assert engine.generate([[3, 4]], max_new_tokens=2), "the thread goes on after the error"
        ticket = engine.submit([3, 4], max_new_tokens=2)
        submitted = []
        ticket.future.add_done_callback(
            lambda _: submitted.append(engine.submit([3, 5], max_new_tokens=2))
        )  # maybe in the engine's own thread
        ticket.result(60)
        while not submitted:
            time.sleep(0.001)
        assert submitted[0].result(60).token_ids

        async def some():
            return await asyncio.gather(*(engine.agenerate([*LEAD, 5 + i], max_new_tokens=2) for i in range(3)))

        assert [r.usage["prompt_tokens"] for r in asyncio.run(some())] == [len(LEAD) + 1] * 3
    assert threads == ["prefixfast-engine"]
