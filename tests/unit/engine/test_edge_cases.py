"""Edge cases of generation: errors of single requests, released memory, and calls that must not hang."""

import gc
import threading
import time
import weakref

import pytest
import torch
from transformers import LogitsProcessorList

import prefixfast
import tiny
from prefixfast import Engine, HFCache, Prefix, PrefixStore, RequestError, load, score
from prefixfast.config import GenerationParams
from prefixfast.engine.sampler import Sampler
from prefixfast.errors import BaseMismatchError, ConfigError, UnknownPrefixError

HOW = {"max_num_seqs": 4, "max_model_len": 160}
LONG = {"max_new_tokens": 150, "min_new_tokens": 150}


# ---- errors of single requests ----


class FailingProcessor:
    """Logits processor that raises once a row has more than four tokens."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 4:
            raise ValueError("boom")
        return scores


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_failing_processor_fails_its_own_request_only(base, run_ahead):
    with Engine(base, **HOW) as engine:
        engine.loop.run_ahead = run_ahead
        expected = engine.generate(["ab"], max_new_tokens=40, min_new_tokens=40)[0].token_ids
        good = engine.submit("ab", max_new_tokens=40, min_new_tokens=40)
        bad = engine.submit(
            "cd", logits_processor=LogitsProcessorList([FailingProcessor()]), max_new_tokens=30, min_new_tokens=30
        )
        beams = engine.submit(
            "cd",
            logits_processor=LogitsProcessorList([FailingProcessor()]),
            max_new_tokens=30,
            min_new_tokens=30,
            num_beams=2,
        )
        for ticket in (bad, beams):
            with pytest.raises(ValueError, match="boom"):
                ticket.result(60)
        assert good.result(60).token_ids == expected
        got = engine.generate(
            ["ab", "cd"],
            logits_processor=LogitsProcessorList([FailingProcessor()]),
            on_error="return",
            max_new_tokens=30,
            min_new_tokens=30,
        )
        assert [g.error for g in got] == ["ValueError: boom"] * 2


@pytest.mark.parametrize("fields", [{"seed": 2**64}, {"seed": 2**62}, {"top_k": 2**63}, {"temperature": 1e-39}])
def test_numbers_that_overflow_are_refused_before_any_work(base, fields):
    with Engine(base, **HOW) as engine, pytest.raises(ConfigError, match=next(iter(fields))):
        engine.submit("ab", do_sample=True, **fields)
    largest = GenerationParams(do_sample=True, seed=2**62 - 1, top_k=2**31 - 1, temperature=1e-6)
    (got,) = prefixfast.generate(
        ["ab"], model=base, params=largest, num_return_sequences=2, max_new_tokens=4, progress=False
    )
    assert len(got.texts) == 2


def test_processors_that_are_no_list_are_refused(base):
    with pytest.raises(ConfigError, match="logits_processor"):
        prefixfast.generate(["ab"], model=base, logits_processor=FailingProcessor())


def test_invalid_text_is_the_error_of_its_request(base):
    got = prefixfast.generate(
        ["\ud83d", "ab", {"prompt": "\ud800"}], model=base, on_error="return", max_new_tokens=2, progress=False
    )
    assert [g.error is None for g in got] == [False, True, False]
    for target in (None, 5, "\ud83d"):
        with pytest.raises(RequestError, match=r"target|request 0"):
            score(["ab"], targets=[target], model=base)


def test_a_failed_request_keeps_its_id(base):
    with Engine(base, **HOW) as engine:
        got = engine.generate(
            [{"prompt": "ab", "id": "x", "nope": 1}, {"prompt": "a", "id": "y", "params": {"num_beams": 9}}],
            on_error="return",
        )
    assert [g.id for g in got] == ["x", "y"]
    assert got[1].error.count("request") == 1


# ---- parameters from files ----


def test_invalid_defaults_of_the_base_are_ignored(caplog):
    model = tiny.make("gpt2")
    model.generation_config.temperature = 0.0
    with Engine(model, **HOW) as engine:
        assert engine.generate([[5, 6]], max_new_tokens=3)[0].finish_reason
        assert engine.generate([[5, 6]], max_new_tokens=3, do_sample=True, temperature=1.0)[0].finish_reason
    assert "temperature" in caplog.text


def test_defaults_of_a_prefix_that_ask_for_beams_that_sample_are_refused(base, make_prefix):
    prefix = make_prefix(decoding={"num_beams": 4, "do_sample": True, "temperature": 0.7})
    with pytest.raises(RequestError, match="sample"):
        prefixfast.generate(["ab"], prefix, model=base)
    assert (
        prefixfast.generate(["ab"], prefix, model=base, num_beams=1, max_new_tokens=2, progress=False)[0].error is None
    )


def test_scores_ignore_generation_parameters(make_prefix):
    model = tiny.make("gpt2")
    model.generation_config.num_return_sequences = 3
    prefix = make_prefix(decoding={"num_beams": 4, "stop_strings": ["x"]})
    with load(model) as base, Engine(base, **HOW) as engine:
        assert engine.score([[5, 6]], prefix, targets=[[7]])[0].logprob < 0


def test_a_score_may_fill_all_positions():
    model = tiny.make("llama")
    ids = torch.randint(3, tiny.VOCAB, (1, 161), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids[:, :-1]).logits[0, -1].log_softmax(-1)[ids[0, -1]].item()
    with Engine(model, **HOW) as engine:
        assert engine.score([ids[0, :-1].tolist()], targets=[[int(ids[0, -1])]])[0].logprob == pytest.approx(
            expected, abs=1e-4
        )
        with pytest.raises(RequestError, match="positions"):
            engine.score([ids[0].tolist()], targets=[[5]])


def test_parameters_with_many_bad_words_are_not_cached(base):
    from prefixfast.config.generation import _merged

    before = _merged.cache_info().currsize
    for i in range(5):
        words = [[j] for j in range(3, 90)] + [[91 + i, 91]]
        assert (
            prefixfast.generate(["ab"], model=base, bad_words_ids=words, max_new_tokens=2, progress=False)[0].token_ids[
                0
            ]
            >= 90
        )
    assert _merged.cache_info().currsize - before < 3


# ---- sampling ----


def test_seeds_that_share_low_bits_give_different_samples():
    sampler = Sampler(6, torch.device("cpu"))
    for row, seed in enumerate((7, 7 + 2**32, 7 + 5 * 2**40)):
        for number in (1, 2):
            sampler.set_row(
                2 * row + number - 1,
                GenerationParams(seed=seed, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
                number,
            )
    assert len(set(sampler.seed.tolist())) == 6


def test_a_special_token_can_be_a_stop_string(base, tokenizer):
    begin = tokenizer.bos_token
    with Engine(base, **HOW) as engine:
        how = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": 150, "min_new_tokens": 150}
        free = next(
            g
            for s in range(20)
            if tokenizer.bos_token_id in (g := engine.generate(["ab"], seed=s, **how)[0]).token_ids and (seed := s) >= 0
        )
        (got,) = engine.generate(["ab"], seed=seed, stop_strings=[begin], **how)
    at = free.token_ids.index(tokenizer.bos_token_id)
    assert got.token_ids == free.token_ids[: at + 1]
    assert got.finish_reason == "stop"


# ---- released memory ----


def test_an_evicted_prefix_is_not_cached_by_a_late_prefetch(base, make_prefix, tmp_path):
    store = PrefixStore(tmp_path / "store")
    for i in range(20):
        store.put(f"p{i}", make_prefix(i))
    with Engine(base, store=store, **HOW) as engine:
        for i in range(20):
            engine.pin(f"p{i}")
        done = [engine.evict(f"p{i}") for i in range(20)]
        assert all(done)
        engine.loop.prefix_cache.loader.close()
        assert not engine.loop.prefix_cache.loader.cacheable
        assert not engine.loop.prefix_cache.numbers


@pytest.mark.parametrize("then", ["unpin", "another request"])
def test_a_pending_eviction_is_carried_out(base, make_prefix, tmp_path, then):
    store = PrefixStore(tmp_path / "store")
    store.put("a", make_prefix(1))
    with Engine(base, store=store, **HOW) as engine:
        ticket = engine.submit("ab", "a", **LONG)
        while not engine.resident():
            time.sleep(0.01)
        assert engine.evict("a") is False
        if then == "unpin":
            engine.unpin("a")
        else:
            engine.submit("ab", "a", max_new_tokens=1).result(60)
        ticket.result(60)
        engine.submit("x", max_new_tokens=1).result(60)
        assert engine.resident() == []
        with pytest.raises(UnknownPrefixError, match="naem"):
            engine.evict("naem")


def test_a_busy_engine_forgets_unused_prefixes(base, make_prefix, monkeypatch):
    monkeypatch.setattr("prefixfast.engine.prefix_cache.MAX_PREFIXES", 8)
    with Engine(base, max_num_seqs=4, max_model_len=160) as engine:
        busy = engine.submit("ab", **LONG)
        for i in range(40):
            engine.submit("ab", make_prefix(i), max_new_tokens=1).result(60)
            if busy.done():
                busy = engine.submit("ab", **LONG)
        assert len(engine.loop.prefix_cache.prefixes) < 16
        busy.cancel()


def test_a_closed_engine_has_no_arena_and_refuses_pins(base, make_prefix):
    engine = Engine(base, **HOW)
    engine.generate(["ab"], make_prefix(), max_new_tokens=2)
    arena = weakref.ref(engine.loop.arena.layers[0][0])
    engine.close()
    gc.collect()
    assert arena() is None
    for call in (
        lambda: engine.pin(make_prefix()),
        engine.resident,
        lambda: engine.evict("0" * 64),
        lambda: engine.score(["a"], targets=["b"]),
    ):
        with pytest.raises(ConfigError, match="closed"):
            call()


def test_a_processor_is_released_with_its_request(base):
    processor = FailingProcessor()
    reference = weakref.ref(processor)
    with Engine(base, **HOW) as engine:
        engine.generate([[5]], logits_processor=LogitsProcessorList([processor]), max_new_tokens=2)
        del processor
        gc.collect()
        assert reference() is None


def test_a_pinned_prefix_that_cannot_be_loaded_is_logged(base, make_prefix, monkeypatch, caplog):
    prefix = make_prefix(5)
    with Engine(base, **HOW) as engine:
        monkeypatch.setattr(
            engine.loop.prefix_cache.loader, "_host_kv", lambda *_: (_ for _ in ()).throw(OSError("gone"))
        )
        engine.pin(prefix)
        for _ in range(100):
            engine.generate(["ab"], max_new_tokens=1)
            if "gone" in caplog.text:
                break
        assert "is unpinned" in caplog.text
        assert not any(r.pinned for r in engine.resident())
        monkeypatch.undo()
        engine.pin(make_prefix(6))
        assert engine.stats()["loads"] == 2


# ---- waiting ----


def test_a_stream_can_be_read_twice(base):
    import asyncio

    with Engine(base, **HOW) as engine:
        stream = engine.stream("ab", max_new_tokens=5, min_new_tokens=5)
        assert "".join(stream) == stream.generation.text
        assert list(stream) == []
        other = engine.astream("ab", max_new_tokens=5, min_new_tokens=5)

        async def read():
            return [piece async for piece in other]

        assert "".join(asyncio.run(read())) == stream.generation.text
        assert asyncio.run(read()) == []


def test_close_waits_for_a_generate_of_another_thread(base):
    engine, out = Engine(base, **HOW), []
    thread = threading.Thread(target=lambda: out.append(engine.generate(["ab"] * 8, **LONG)))
    thread.start()
    while engine.loop.counts["steps"] < 3:
        time.sleep(0.01)
    engine.close()
    thread.join(60)
    assert len(out[0]) == 8


def test_callbacks_of_tickets_cannot_wait_for_their_own_thread(base):
    with Engine(base, **HOW) as engine:
        seen = []

        def callback(_):
            for call in (engine.close, lambda: engine.generate(["ab"], max_new_tokens=1)):
                try:
                    call()
                except ConfigError as e:
                    seen.append(str(e))
            seen.append(engine.submit("ab", max_new_tokens=1))

        engine.submit("ab", max_new_tokens=2).future.add_done_callback(callback)
        while len(seen) < 3:
            time.sleep(0.01)
        assert ["callback" in s for s in seen[:2]] == [True, True]
        assert seen[2].result(60).finish_reason
        with pytest.raises(ConfigError, match="timeout"):
            engine.submit("ab", timeout=float("nan"))


# ---- HFCache ----


def test_a_used_cache_and_a_prompt_in_chunks_are_refused():
    ids = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    both = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
    }
    with load(tiny.make("llama")) as model:
        with HFCache(model) as cache:
            model.hf.generate(**both, past_key_values=cache)
            longer = torch.cat([ids, ids], 1)
            for again in (ids, longer):
                with pytest.raises(ConfigError, match="new cache"):
                    model.hf.generate(
                        **{**both, "input_ids": again, "attention_mask": torch.ones_like(again)}, past_key_values=cache
                    )
        with HFCache(model) as cache, pytest.raises(ConfigError, match="prefill_chunk_size"):
            model.hf.generate(**both, past_key_values=cache, prefill_chunk_size=3)


def test_a_dropped_cache_releases_its_memory():
    with load(tiny.make("gpt2")) as model:
        prefix = Prefix({f"self.{i}.{x}": torch.randn(3, 4, 8) for i in range(3) for x in "kv"}, 3)
        before = threading.active_count()
        for _ in range(4):
            cache = HFCache(model, prefix)
            model.hf.generate(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, max_new_tokens=2)
            arena = weakref.ref(cache.loop.arena.layers[0][0])
            del cache
            gc.collect()
            assert arena() is None
        assert threading.active_count() == before
        with HFCache(model, [prefix, prefix]) as cache, pytest.raises(ConfigError, match="num_beams"):
            model.hf.generate(input_ids=torch.tensor([[5, 6]] * 4), past_key_values=cache, max_new_tokens=2)
        with (
            pytest.raises(BaseMismatchError),
            HFCache(model, Prefix({"self.0.k": torch.ones(1, 1, 1), "self.0.v": torch.ones(1, 1, 1)}, 1)) as cache,
        ):
            model.hf.generate(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, max_new_tokens=2)
