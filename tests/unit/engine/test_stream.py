"""Streams, whose joined pieces are the whole text, stop strings as in transformers, and errors of single requests."""

import asyncio
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixfast import Engine, Prefix
from prefixfast.data.builtin_tasks import E2E
from prefixfast.data.task import Task
from prefixfast.engine.stream import TextPieces
from prefixfast.errors import BaseMismatchError, ConfigError, RequestError

NEW = {"max_new_tokens": 24, "do_sample": True, "temperature": 3.0, "top_k": 0}
TEXT = st.lists(st.integers(3, 100), max_size=40)


@settings(max_examples=150, deadline=None)
@given(ids=TEXT, strip=st.booleans())
def test_pieces_joined_are_the_text(base, ids, strip):
    pieces = TextPieces(base.require_tokenizer().stream(), strip=strip)
    text = "".join([*map(pieces.push, ids), pieces.finish()])
    (whole,) = base.require_tokenizer().decode([ids])
    assert text == Task("x", strip=strip).clean(whole)


def test_a_character_is_emitted_once_its_bytes_are_complete(base):
    pound = base.require_tokenizer().encode(["£"])[0].tolist()
    assert len(pound) == 2
    pieces = TextPieces(base.require_tokenizer().stream(), strip=False)
    assert [pieces.push(pound[0]), pieces.push(pound[1])] == ["", "£"]
    assert [pieces.push(pound[0]), pieces.finish()] == ["", "\ufffd"]


@pytest.mark.parametrize("spec", [None, E2E.spec()])
def test_a_stream_gives_the_text_of_generate(base, make_prefix, spec):
    prefix = make_prefix(task=spec)
    item = "ab" if spec is None else {"mr": "name[ab]"}
    with Engine(base, max_num_seqs=4, max_model_len=64) as engine:
        for seed in range(20):
            how = {**NEW, "seed": seed, "num_beams": 1, "min_new_tokens": 12}
            (expected,) = engine.generate([item], prefix, **how)
            stream = engine.stream(item, prefix, **how)
            pieces = list(stream)
            assert "".join(pieces) == expected.text == stream.generation.text
            assert stream.generation.token_ids == expected.token_ids
            assert len(pieces) > 1


def test_streams_of_an_event_loop_take_turns(base, make_prefix):
    prefixes = [make_prefix(i) for i in range(5)]
    how = {**NEW, "min_new_tokens": 24}

    async def one(engine: Engine, i: int, order: list[int]) -> str:
        pieces = []
        async for piece in engine.astream("ab", prefixes[i], seed=i, **how):
            pieces.append(piece)
            order.append(i)
        return "".join(pieces)

    async def run(engine: Engine) -> tuple[list[str], list[int]]:
        order: list[int] = []
        return await asyncio.gather(*(one(engine, i, order) for i in range(5))), order

    with Engine(base, max_num_seqs=8, max_model_len=64) as engine:
        texts, order = asyncio.run(run(engine))
        expected = [engine.generate(["ab"], prefixes[i], seed=i, **how)[0].text for i in range(5)]
    assert texts == expected
    assert len(list(itertools.groupby(order))) > 5, "the streams must take turns"


def test_leaving_a_stream_cancels_its_request(base):
    with Engine(base, max_num_seqs=2, max_model_len=160) as engine:
        stream = engine.stream("ab", max_new_tokens=150, min_new_tokens=150)
        for _ in stream:
            break
        assert stream.generation.finish_reason == "cancelled"

        async def some() -> None:
            inner = engine.astream("ab", max_new_tokens=150, min_new_tokens=150)
            pieces = aiter(inner)
            await anext(pieces)
            await pieces.aclose()
            assert inner.generation.finish_reason == "cancelled"

        asyncio.run(some())
        third = engine.stream("ab", max_new_tokens=150, min_new_tokens=150)
        engine.cancel(third)
        text = "".join(third)
        assert third.generation.finish_reason == "cancelled"
        assert third.generation.text == text


def test_a_stream_raises_the_error_of_its_request(base, make_prefix, monkeypatch):
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine:
        monkeypatch.setattr(
            engine.loop.prefix_cache.loader, "_host_kv", lambda *_: (_ for _ in ()).throw(OSError("gone"))
        )
        with pytest.raises(OSError, match="gone"):
            list(engine.stream("ab", make_prefix()))


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_stream_of_several_texts_is_refused(base, how):
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine, pytest.raises(RequestError, match="stream"):
        engine.stream("ab", **how)


def test_stop_strings_end_the_text_as_in_transformers(base, folder, tokenizer):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    num_stopped = 0
    with Engine(base, max_num_seqs=8, max_model_len=64) as engine:
        plain = [g.text for g in engine.generate(["ab", "x y", "Q!"], max_new_tokens=20)]
        for prompt, text in zip(["ab", "x y", "Q!"], plain, strict=True):
            for stop in {text[3:5], text[6:7], text[2:9], "never to come"} - {""}:
                (got,) = engine.generate([prompt], max_new_tokens=20, stop_strings=[stop, "nor this"])
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                out = theirs.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=20,
                    do_sample=False,
                    stop_strings=[stop],
                    tokenizer=tokenizer,
                )[0, ids.shape[1] :].tolist()
                assert got.token_ids == out
                assert got.finish_reason == (
                    "stop" if stop in got.text or out[-1] == tokenizer.eos_token_id else "length"
                )
                num_stopped += stop in got.text
    assert num_stopped > 5


def test_a_stop_string_ends_each_sample_separately(base):
    how = {**NEW, "max_new_tokens": 30, "min_new_tokens": 30, "num_return_sequences": 4, "seed": 3}
    with Engine(base, max_num_seqs=8, max_model_len=64) as engine:
        (free,) = engine.generate(["ab"], **how)
        stop = free.texts[1][4:6]
        (got,) = engine.generate(["ab"], stop_strings=stop, **how)
    for before, after in zip(free.texts, got.texts, strict=True):
        assert after == (before[: before.index(stop) + len(stop)] if stop in before else before)
    assert got.texts != free.texts


def test_stop_strings_need_a_tokenizer():
    import tiny

    with (
        Engine(tiny.make("gpt2"), max_num_seqs=2, max_model_len=32) as engine,
        pytest.raises(ConfigError, match="tokenizer"),
    ):
        engine.generate([[5, 6]], stop_strings=["a"], max_new_tokens=4)


# ---- errors of single requests ----


def test_errors_are_returned_beside_good_results(base, make_prefix, tmp_path):
    good = make_prefix()
    foreign = Prefix(dict(good.kv), 4, base={"name": "other", "config": {"model_type": "llama"}, "weights": "x"})
    batch = [
        "ab",
        {"promt": "x"},
        "cd",
        [5] * 500,
        "ef",
        {"prompt": "gh", "params": {"temperature": 0.5}},
        {"prompt": "ij", "id": "last"},
    ]
    prefixes = [good, good, foreign, None, None, good, good]
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine:
        got = engine.generate(batch, prefixes, on_error="return", max_new_tokens=4)
        fine = engine.generate(["ab", "ef", "ij"], [good, None, good], max_new_tokens=4)
        assert [g.index for g in got] == list(range(7))
        assert [got[i].token_ids for i in (0, 4, 6)] == [g.token_ids for g in fine]
        assert got[6].id == "last"
        for i, (kind, words) in {
            1: ("RequestError", "request 1: unknown key"),
            2: ("BaseMismatchError", "other"),
            3: ("RequestError", "request 3"),
            5: ("RequestError", "do_sample"),
        }.items():
            assert got[i].finish_reason == "error"
            assert got[i].error.startswith(kind)
            assert words in got[i].error
        with pytest.raises(RequestError, match="request 1: unknown key"):  # rows are checked before prefixes
            engine.generate(batch, prefixes, max_new_tokens=4)
        with pytest.raises(BaseMismatchError, match="other"):
            engine.generate(["ab", "x", *batch[2:]], prefixes, max_new_tokens=4)
        with pytest.raises(ConfigError, match="on_error"):
            engine.generate(["ab"], on_error="ignore")
        with pytest.raises(ConfigError, match="one entry for each"):
            engine.generate(["ab"], [None, None], on_error="return")


def test_a_prefix_that_cannot_be_read_is_an_error_of_its_requests(base, make_prefix, monkeypatch):
    broken, fine = make_prefix(1), make_prefix(2)
    with Engine(base, max_num_seqs=4, max_model_len=64) as engine:
        real = engine.loop.prefix_cache.loader._host_kv

        def reading(number, prefix):
            if prefix is broken:
                raise OSError("gone")
            return real(number, prefix)

        monkeypatch.setattr(engine.loop.prefix_cache.loader, "_host_kv", reading)
        for _ in range(2):
            got = engine.generate(["ab"] * 3, [fine, broken, fine], on_error="return", max_new_tokens=4)
            assert [g.error for g in got] == [None, "OSError: gone", None]
        with pytest.raises(OSError, match="gone"):
            engine.generate(["ab"] * 2, [fine, broken], max_new_tokens=4)
        engine.submit("ab").result(60)
        assert [
            g.error for g in engine.generate(["ab"] * 3, [fine, broken, fine], on_error="return", max_new_tokens=4)
        ] == [None, "OSError: gone", None]
