"""State of the engine: waiting requests, eviction and reload, several prefixes, windows, errors and interrupts."""

import functools

import pytest

import prefixfast
import tiny
from mixes import prefixes_of, requests
from prefixfast import Engine
from prefixfast.errors import CapacityError, ConfigError


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3"])
def test_a_full_arena_gives_the_same_as_each_request_alone(family):
    base = tiny.make(family)
    batch, chosen = requests(base, 5)
    with (
        prefixfast.load(tiny.make(family), backend="reference") as plain,
        Engine(plain, max_num_seqs=8, max_model_len=48) as alone,
    ):
        expected = [alone.generate([b], [c])[0].token_ids for b, c in zip(batch, chosen, strict=True)]
    with Engine(base, max_num_seqs=7, max_model_len=48, max_num_batched_tokens=40) as probe:
        row = sum(t[0].numel() * t.element_size() for kv in probe.loop.arena.layers for t in kv)
    with Engine(base, max_num_seqs=7, max_model_len=48, max_num_batched_tokens=40, kv_cache_memory=row * 290) as engine:
        for _ in range(2):
            assert [g.token_ids for g in engine.generate(batch, chosen)] == expected
        assert engine.stats()["evictions"] > 0, "the arena must be too small for all prefixes"


@pytest.mark.parametrize(
    "where",
    ["prefix_cache.start_loads", "prefix_cache.loader.load", "runner.prefill", "runner.decode", "batch.choose_tokens"],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_engine_works_again_after_an_error_in_a_step(where, error, monkeypatch):
    base = tiny.make("llama")
    batch, chosen = requests(base, 6)
    with Engine(base, max_num_seqs=7, max_model_len=48) as engine:
        expected = [g.token_ids for g in engine.generate(batch, chosen)]
    with Engine(base, max_num_seqs=7, max_model_len=48) as engine:
        *path, name = where.split(".")
        owner = functools.reduce(getattr, path, engine.loop)
        original, calls = getattr(owner, name), []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
        with pytest.raises(error):
            engine.generate(batch, chosen)
        assert engine.loop.scheduler.num_running == engine.loop.scheduler.num_waiting == 0
        assert [g.token_ids for g in engine.generate(batch, chosen)] == expected


def test_end_tokens_outside_the_vocabulary_are_ignored():
    base = tiny.make("gpt2")
    expected = []
    for end in (None, [50256, -1]):
        base.generation_config.eos_token_id = end
        with Engine(base, max_num_seqs=6, max_model_len=32) as engine:
            expected.append(
                [engine.generate([[5, 6]], max_new_tokens=6, num_beams=beams)[0].token_ids for beams in (1, 3)]
            )
    assert expected[0] == expected[1]


def test_a_closed_base_or_engine_is_refused():
    base = tiny.make("gpt2")
    model = prefixfast.load(base)
    engine = Engine(model, max_num_seqs=2, max_model_len=16)
    model.close()
    with pytest.raises(ConfigError, match="detached"):
        engine.generate([[5, 6]], max_new_tokens=2)
    engine.close()
    with pytest.raises(ConfigError, match="closed"):
        engine.generate([[5, 6]], max_new_tokens=2)
    with pytest.raises(ConfigError, match="closed"):
        prefixfast.generate([[5, 6]], model=model, max_new_tokens=2)


def test_a_base_in_training_mode_is_refused():
    base = tiny.make("gpt2")
    with Engine(base, max_num_seqs=2, max_model_len=16) as engine:
        base.train()
        with pytest.raises(ConfigError, match="training mode"):
            engine.generate([[5, 6]], max_new_tokens=2)


def test_a_request_that_can_never_fit_is_a_capacity_error_with_its_index():
    with Engine(tiny.make("gpt2"), max_num_seqs=2, max_model_len=64) as engine:
        with pytest.raises(CapacityError, match="request 1 can never run"):
            engine.generate([[5, 6], {"input_ids": [5], "params": {"num_beams": 3}}], max_new_tokens=4)
        assert len(engine.generate([[5, 6]], max_new_tokens=4)[0].token_ids) <= 4


def test_an_engine_forgets_prefixes_beyond_the_limit(monkeypatch):
    monkeypatch.setattr("prefixfast.engine.prefix_cache.MAX_PREFIXES", 5)
    base = tiny.make("gpt2")
    with Engine(base, max_num_seqs=4, max_model_len=16) as engine:
        for seed in range(3):
            engine.generate([[5, 6]] * 12, prefixes_of(base, seed), max_new_tokens=2)
        assert len(engine.loop.prefix_cache.prefixes) == len(engine.loop.prefix_cache.numbers) == 5


def test_unsupported_defaults_of_the_base_are_logged(caplog):
    base = tiny.make("gpt2")
    base.generation_config.typical_p = 0.8
    with Engine(base, max_num_seqs=2, max_model_len=16):
        assert "typical_p=0.8" in caplog.text
