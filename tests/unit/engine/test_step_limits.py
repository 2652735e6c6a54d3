"""The limits of a step hold in every step of random workloads, and the errors of the limits name options that exist."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixfast import CapacityError, ConfigError, Engine, EngineConfig, GenerationParams, RequestError, train
from prefixfast.errors import LIMITS, capacity_error

REQUEST = st.tuples(
    st.integers(1, 60),  # prompt tokens
    st.integers(1, 6),  # new tokens
    st.sampled_from([{}, {"num_beams": 2}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 5}]),
    st.integers(0, 2),  # prefix
)


def count_steps(engine: Engine) -> list[tuple[int, int]]:
    """Numbers of prompt tokens and of decoded rows of each later step, in a list that grows."""
    steps: list[tuple[int, int]] = []
    runner = engine.loop.runner
    prefill, decode = runner.prefill, runner.decode

    def size(layout: tuple[list[Mapping[str, tuple[int, int, int]]], list[int]] | None, name: str) -> int:
        return 0 if layout is None else layout[0][0][name][1]

    def counted_prefill(buffer, header, *rest):
        steps.append((size(header.prefill, "slots"), size(header.decode, "slot")))
        return prefill(buffer, header, *rest)

    def counted_decode(buffer, header, *rest):
        if header.prefill is None:
            steps.append((0, size(header.decode, "slot")))
        return decode(buffer, header, *rest)

    runner.prefill, runner.decode = counted_prefill, counted_decode
    return steps


@pytest.mark.parametrize("limits", [(4, 64), pytest.param((16, 12), marks=pytest.mark.long), (8, 24), (64, 6)], ids=str)
def test_limits_hold_in_every_step(base, make_prefix, limits):
    sequences, tokens = limits
    prefixes = [None, make_prefix(1), make_prefix(2, length=9)]
    with Engine(base, max_num_seqs=sequences, max_num_batched_tokens=tokens, max_model_len=80, seed=0) as engine:
        steps = count_steps(engine)

        @given(st.lists(REQUEST, min_size=1, max_size=12))
        @settings(derandomize=True, deadline=None, max_examples=12, database=None)
        def run(work):
            steps.clear()
            batch = [
                {"input_ids": [5 + i % 90 for i in range(n)], "params": {"max_new_tokens": new, **params}}
                for n, new, params, _ in work
            ]
            made = engine.generate(batch, [prefixes[p] for *_, p in work], on_error="return")
            for g, (n, *_, params, _) in zip(made, work, strict=True):
                rows = params.get("num_beams") or params.get("num_return_sequences") or 1
                assert (g.finish_reason == "error") == (rows > min(sequences, tokens - tokens // 4)), g
                assert g.error is None or g.error.startswith("CapacityError")
                assert g.usage == {} or g.usage["prompt_tokens"] == n
            assert all(prompt + decoded <= tokens and decoded <= sequences for prompt, decoded in steps), steps

        run()


@pytest.mark.parametrize("limit", LIMITS)
def test_errors_of_limits_name_options_that_exist(limit):
    error = capacity_error(limit, 12, 5)
    assert (error.limit, error.needed, error.available) == (limit, 12, 5)
    options = {f.name for of in (EngineConfig, GenerationParams) for f in dataclasses.fields(of)}
    named = set(re.findall(r"[a-z]+(?:_[a-z]+)+", str(error)))
    assert named <= options | {"buffer_len"}
    assert "12" in str(error)
    assert "5" in str(error)


def test_an_error_names_the_request_and_what_helps(base, make_prefix):
    with Engine(base, max_num_seqs=2, kv_cache_memory=150 * 3 * 2 * 4 * 8 * 4) as engine:
        for fields, limit, option in [
            ({"num_beams": 3}, "decode_rows", "max_num_seqs"),
            ({"max_new_tokens": 140}, "arena_rows", "kv_cache_memory"),
        ]:
            with pytest.raises(CapacityError, match=f"request 1 can never run: .*{option}") as caught:
                engine.generate(
                    [
                        {"input_ids": [5], "params": {"max_new_tokens": 2}},
                        {"input_ids": [5, 6], "params": {"max_new_tokens": 2, **fields}},
                    ]
                )
            assert caught.value.limit == limit
            assert caught.value.needed > caught.value.available
    with (
        Engine(base, prefix_memory=10_000) as engine,
        pytest.raises(CapacityError, match=r"request 0 can never run: .*prefix_memory") as caught,
    ):
        engine.generate([[5]], make_prefix(length=90), max_new_tokens=2)
    assert caught.value.limit == "prefix_rows"


def test_prefixes_that_leave_no_position_for_text(base, make_prefix):
    far = make_prefix(pos_start=200)
    with Engine(base) as engine:
        for call in (
            lambda: engine.generate([[5], [6]], [None, far], max_new_tokens=1),
            lambda: engine.score([[5], [6]], [None, far], targets=[[7], [8]]),
        ):
            with pytest.raises(RequestError, match="request 1: its text starts at position 200") as caught:
                call()
            assert caught.value.index == 1
    data = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    with pytest.raises(ConfigError, match="rows start at position 200") as refused:
        train(base, data, on_top_of=far, max_steps=1, prefix_length=2, init="random")
    assert not re.search(r"-\d", str(refused.value))
