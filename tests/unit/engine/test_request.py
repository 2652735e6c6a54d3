"""Checks of a caller's batch: every mistake is reported before any work is done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tiny
from prefixfast import BaseMismatchError, ConfigError, Engine, GenerationParams, Prefix, RequestError, load
from prefixfast.data.builtin_tasks import E2E
from prefixfast.engine.make_requests import make_requests
from prefixfast.engine.sampling_params import MAX_LOADED_BEAMS, MAX_LOADED_NEW_TOKENS
from prefixfast.prefix import peft_format as layout

OK = [3, 4, 5]
NONE = GenerationParams()


@pytest.fixture(scope="module")
def engine(base):
    with Engine(base, max_num_seqs=4, max_model_len=40) as made:
        yield made


@pytest.fixture
def idle(engine, monkeypatch):
    """An engine whose model fails the test if it runs."""

    def run(*_: Any) -> None:
        pytest.fail("the model ran before the batch was checked")

    monkeypatch.setattr(engine.model, "forward", run)
    yield engine
    assert engine.loop.scheduler.num_waiting == engine.loop.scheduler.num_running == 0


PREFIX = object()  # placeholder of a good prefix in the tables below
OTHER = object()


def filled(value: Any, make_prefix) -> Any:
    """The value with real prefixes in place of the placeholders."""
    if isinstance(value, dict):
        return {k: filled(v, make_prefix) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(filled(v, make_prefix) for v in value)
    return make_prefix(1) if value is PREFIX else make_prefix(2) if value is OTHER else value


ARGUMENTS = {
    "a bare string": ("hello", None, "batch: expected a sequence of requests, got str; wrap one request in a list"),
    "a bare row": ({"prompt": "hello"}, None, "batch: expected a sequence of requests, got dict; wrap"),
    "a flat list of ids": ([3, 4], None, "batch: expected a sequence of requests, got a flat list of ints; wrap"),
    "an iterator": (iter([OK]), None, "batch: expected a sequence of requests, got list_iterator"),
    "too few prefixes": (
        [OK, OK],
        [PREFIX],
        "prefixes: expected one entry for each of the 2 requests, got 1; pass one prefix for all requests without a",
    ),
    "too many prefixes": ([OK], [PREFIX, PREFIX], "prefixes: expected one entry for each of the 1 requests, got 2"),
    "a number": ([OK], 3, "prefixes: expected a Prefix, .*, got int"),
    "an unknown parameter": ([OK], None, "unknown option 'max_tokens'; did you mean max_new_tokens"),
}


@pytest.mark.parametrize(("batch", "prefixes", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_refused(idle, make_prefix, batch, prefixes, message):
    with pytest.raises(ConfigError, match=message):
        idle.generate(batch, filled(prefixes, make_prefix), **({"max_tokens": 3} if "max_tokens" in message else {}))


BY_NAME = {"a": PREFIX, "b": OTHER}
REQUESTS = {
    "no prefix": ([OK, OK], [PREFIX, 5], "prefix: expected a Prefix, None or a sequence of Prefix, got 5"),
    "a folder in a list": (
        [OK, OK],
        [PREFIX, "x/y"],
        "prefix: expected a Prefix, None or a sequence of Prefix, got 'x/y'; read a folder with",
    ),
    "a folder in a sequence of prefixes": ([OK, OK], [None, [PREFIX, "x"]], "prefix: expected a Prefix"),
    "no name": (
        [{"prompt": "x", "prefix": "a"}, {"prompt": "x"}],
        BY_NAME,
        "expected a 'prefix' key with the name of a prefix, got None; known are 'a', 'b'",
    ),
    "an unknown name": (
        [{"prompt": "x", "prefix": "a"}, {"prompt": "x", "prefix": "c"}],
        BY_NAME,
        "expected a 'prefix' key with the name of a prefix, got 'c'; known are 'a', 'b'",
    ),
    "a misspelt name of many": (
        [{"prompt": "x", "prefix": "user-7y"}, {"prompt": "x", "prefix": "user-7x"}],
        {f"user-{i}{c}": PREFIX for i in range(99, 0, -1) for c in "ay"},
        "got 'user-7x'; did you mean 'user-7",
    ),
    "another name of many": (
        [{"prompt": "x", "prefix": "user-01"}, {"prompt": "x", "prefix": "zzz"}],
        {f"user-{i:02}": PREFIX for i in range(99, 0, -1)},
        "known are 'user-01', 'user-02', 'user-03'",
    ),
    "a list as name": (
        [{"prompt": "x", "prefix": "a"}, {"prompt": "x", "prefix": ["a"]}],
        BY_NAME,
        "expected a 'prefix' key with the name of a prefix, got ['a']; known are 'a', 'b'",
    ),
    "no row but a mapping of prefixes": (
        [{"prompt": "x", "prefix": "a"}, OK],
        BY_NAME,
        "expected a 'prefix' key with the name of a prefix, got None; known are 'a', 'b'",
    ),
    "an unknown key": ([OK, {"prompt": "x", "promt": "y"}], None, "unknown key 'promt'; did you mean 'prompt'?"),
    "no input": ([OK, {"id": 5}], None, "expected one of the keys prompt, mr, table"),
    "a prompt that is no string": ([OK, {"prompt": 5}], None, "prompt: expected a string, got 5"),
    "no tokens": ([OK, []], None, "the prompt has no tokens"),
    "no characters": ([OK, ""], None, "the prompt has no tokens"),
    "no tokens in a row": ([OK, {"input_ids": []}], None, "the prompt has no tokens"),
    "an id too large": ([OK, [3, tiny.VOCAB]], None, f"token ids from 0 to {tiny.VOCAB - 1}"),
    "a huge id": ([OK, [3, 2**70]], None, "token ids from 0 to"),
    "a negative id": ([OK, [-1]], None, "token ids from 0 to"),
    "an id too large in a row": ([OK, {"input_ids": [tiny.VOCAB]}], None, "token ids from 0 to"),
    "fractions": ([OK, [3.0]], None, "token ids from 0 to"),
    "booleans": ([OK, [True]], None, "token ids from 0 to"),
    "nested lists": ([OK, [[3, 4]]], None, "token ids from 0 to"),
    "ragged lists": ([OK, [[3, 4], [5]]], None, "token ids from 0 to"),
    "nothing": ([OK, None], None, "expected a string, a list of token ids"),
    "a number": ([OK, 5], None, "expected a string, a list of token ids"),
    "too long": ([OK, [3] * 40], None, "40 prompt tokens and at least 1 new ones exceed the limit of 40"),
    "too long to answer": (
        [OK, {"input_ids": [3] * 20, "params": {"max_new_tokens": 21}}],
        None,
        "20 prompt tokens and 21 new ones exceed the limit of 40",
    ),
    "an unknown parameter": ([OK, {"input_ids": OK, "params": {"beams": 3}}], None, "unknown option 'beams'"),
    "a wrong parameter": (
        [OK, {"input_ids": OK, "params": {"num_beams": 0}}],
        None,
        "GenerationParams.num_beams: expected at least 1, got 0",
    ),
    "parameters that are no mapping": (
        [OK, {"input_ids": OK, "params": 5}],
        None,
        "expected a GenerationParams or a mapping, got int",
    ),
    "a number as table": ([OK, {"table": 5}], None, ""),
    "a malformed meaning representation": ([OK, {"mr": "name[x"}], None, ""),
}


@pytest.mark.parametrize(("batch", "prefixes", "message"), REQUESTS.values(), ids=REQUESTS)
def test_a_wrong_request_is_reported_with_its_index(idle, make_prefix, batch, prefixes, message):
    with pytest.raises(RequestError) as caught:
        idle.generate(filled(batch, make_prefix), filled(prefixes, make_prefix))
    assert message in str(caught.value)
    assert "request 1: " in str(caught.value)
    assert caught.value.index == 1


def test_positions_after_a_prefix_count_against_the_limit(base, make_prefix):
    long = make_prefix(length=150)
    with pytest.raises(RequestError, match="exceed the limit of 10;"):
        make_requests(base, [[3] * 10], long, NONE, 1000)
    assert len(make_requests(base, [[3] * 10], make_prefix(length=150, pos_start=0), NONE, 1000)) == 1


def foreign_prefix(base, family: str, seed: int) -> Prefix:
    """A prefix of another base model."""
    with load(tiny.make(family, seed=seed)) as other:
        table = tiny.peft_table(tiny.make(family), 4, seed=1)
        return Prefix(layout.from_table(table, *tiny.shapes(other.hf)), pos_start=4, base=other.fingerprint)


def test_a_prefix_of_another_architecture_is_refused(idle, base):
    with pytest.raises(BaseMismatchError, match="model_type is 'llama' there and 'gpt2' here"):
        idle.generate([OK], foreign_prefix(base, "llama", 0))


def test_a_prefix_of_other_weights_is_refused(idle, base):
    assert foreign_prefix(base, "gpt2", 0).base["weights"] == base.fingerprint["weights"], (
        "equal weights have equal fingerprints"
    )
    with pytest.raises(BaseMismatchError, match="weights differ; load the base it was trained on"):
        idle.generate([OK], [None, foreign_prefix(base, "gpt2", 1)][1:])


SHAPES = {
    "heads": {"heads": 2},
    "head dim": {"dim": 16},
    "a layer less": {"layers": 2},
    "a layer more": {"layers": 4},
    "a layer beyond": {"layers": (1, 3)},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_unmarked_prefix_of_another_shape_is_refused(idle, make_prefix, shape):
    with pytest.raises(BaseMismatchError, match="was it trained on another model"):
        idle.generate([OK, OK], [None, make_prefix(**shape)])


def test_layers_of_different_lengths_are_refused(idle, make_prefix):
    kv = {**make_prefix(layers=(0, 1)).kv, **make_prefix(layers=(2,), length=3).kv}
    with pytest.raises(BaseMismatchError, match="different lengths"):
        idle.generate([OK], Prefix(kv, pos_start=4))


# ---- parameters: call > request > prefix > generation_config > built-in ----

LEVELS = ("call", "request", "prefix", "config")


@pytest.mark.parametrize("given", [LEVELS[i:] for i in range(5)], ids=lambda g: g[0] if g else "built-in")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", (11, 12, 13, 14, 256)),
        ("num_beams", (2, 3, 4, 5, 1)),
        ("length_penalty", (0.1, 0.2, 0.3, 0.4, 1.0)),
    ],
)
def test_the_first_level_with_a_value_takes_precedence(base, make_prefix, monkeypatch, given, name, values):
    values_of = {level: {name: value} if level in given else {} for level, value in zip(LEVELS, values, strict=False)}
    for key, value in values_of["config"].items():
        monkeypatch.setattr(base.hf.generation_config, key, value)
    batch = [{"input_ids": OK, "params": values_of["request"]}]
    (request,) = make_requests(
        base, batch, make_prefix(decoding=values_of["prefix"]), GenerationParams(**values_of["call"]), 1000
    )
    expected = values[LEVELS.index(given[0]) if given else 4]
    assert getattr(request.params, name) == (
        expected if name != "max_new_tokens" or given else min(256, 160 - 4 - len(OK))
    )


def test_the_last_of_several_prefixes_takes_precedence(base, make_prefix):
    a, b = make_prefix(1, decoding={"num_beams": 2, "max_new_tokens": 9}), make_prefix(2, decoding={"num_beams": 3})
    (request,) = make_requests(base, [OK], [[a, b]], NONE, 1000)
    assert (request.params.num_beams, request.params.max_new_tokens) == (3, 9)


@pytest.mark.parametrize("source", ["prefix", "config"])
@pytest.mark.parametrize(("name", "cap"), [("max_new_tokens", MAX_LOADED_NEW_TOKENS), ("num_beams", MAX_LOADED_BEAMS)])
def test_loaded_values_are_capped(base, make_prefix, monkeypatch, source, name, cap):
    monkeypatch.setattr(type(base), "max_positions", 10**7)
    if source == "config":
        monkeypatch.setattr(base.hf.generation_config, name, 10**6)
    (request,) = make_requests(
        base, [OK], make_prefix(decoding={name: 10**6} if source == "prefix" else {}), NONE, 10**7
    )
    assert getattr(request.params, name) == cap


def test_a_length_from_a_prefix_is_cut_to_what_fits(base, make_prefix):
    (request,) = make_requests(
        base, [OK], make_prefix(decoding={"max_new_tokens": 100, "min_new_tokens": 90}), NONE, 20
    )
    assert (request.params.max_new_tokens, request.params.min_new_tokens) == (17, 17)


def test_a_wrong_default_of_a_prefix_is_an_error_of_the_request(idle, make_prefix):
    with pytest.raises(RequestError, match="request 1: GenerationParams: unknown option 'beams'"):
        idle.generate([OK, OK], [None, make_prefix(decoding={"beams": 2})])


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"name": "e2e", "style": 1},
        {"name": "e2e", "linearizer": 5},
        {"name": "e2e", "linearizer": '{"style": "zzz"}'},
    ],
    ids=str,
)
def test_a_wrong_linearizer_in_a_prefix_is_refused(idle, make_prefix, spec):
    with pytest.raises((ConfigError, RequestError)):
        idle.generate([{"mr": "name[x]"}], make_prefix(task=spec))


# ---- requests of a good batch ----


def test_every_kind_of_input_becomes_tokens(base, tokenizer):
    batch = [
        "ab",
        [3, 4],
        {"prompt": "ab", "id": "x"},
        {"input_ids": [3, 4]},
        {"input_ids": np.array([5])},
        {"mr": "name[a]", "ref": "ignored"},
    ]
    ids = [r.ids.tolist() for r in make_requests(base, batch, None, NONE, 100)]
    assert ids == [
        tokenizer.encode("ab"),
        [3, 4],
        tokenizer.encode("ab"),
        [3, 4],
        [5],
        tokenizer.encode(" name : a </s>"),
    ]


def test_a_table_is_linearized_by_the_task_of_the_prefix(base, make_prefix, tokenizer):
    (request,) = make_requests(base, [{"mr": "name[a], food[b]"}], make_prefix(task=E2E.spec()), NONE, 100)
    assert request.ids.tolist() == tokenizer.encode(" name : a | food : b </s>")


def test_requests_have_the_id_and_index_of_their_row(base):
    made = make_requests(base, [{"input_ids": OK, "id": 7}, OK], None, NONE, 100)
    assert [(r.index, r.id) for r in made] == [(0, 7), (1, None)]


def test_rows_name_their_prefixes(base, make_prefix):
    a, b = make_prefix(1), make_prefix(2)
    by_name = {"x": a, "y": [a, b], "z": None}
    rows = [{"input_ids": OK, "prefix": n} for n in "zyx"]
    digests = [[p.digest for p in r.prefixes] for r in make_requests(base, rows, by_name, NONE, 100)]
    assert digests == [[], [a.digest, b.digest], [a.digest]]


def test_a_base_without_a_tokenizer_takes_token_ids_only():
    with load(tiny.make("gpt2")) as bare:
        assert len(make_requests(bare, [OK], None, NONE, 100)) == 1
        with pytest.raises(
            ConfigError, match=r"this base has no tokenizer: give token ids, or load\(model, tokenizer=...\)"
        ):
            make_requests(bare, ["text"], None, NONE, 100)


def test_an_empty_batch_gives_nothing(idle):
    assert idle.generate([]) == []


def test_a_good_batch_runs_after_a_refused_one(engine, make_prefix):
    with pytest.raises(RequestError):
        engine.generate([OK, [tiny.VOCAB]], make_prefix(), max_new_tokens=3)
    (result,) = engine.generate([OK], make_prefix(), max_new_tokens=3)
    assert result.usage == {"prompt_tokens": 3, "completion_tokens": len(result.token_ids), "prefix_rows": 4}
    assert torch.tensor(result.token_ids).max() < tiny.VOCAB


def test_fingerprint_of_base_is_read_once_for_all_prefixes(base, make_prefix, monkeypatch):
    reads = []
    read = type(base).fingerprint.fget
    monkeypatch.setattr(type(base), "fingerprint", property(lambda model: (reads.append(1), read(model))[1]))
    prefixes = [make_prefix(length=n) for n in range(1, 6)]
    assert len(make_requests(base, [OK] * 6, [*prefixes, None], NONE, 1000)) == 6
    assert len(reads) == 1
    make_requests(base, [OK], None, NONE, 1000)
    assert len(reads) == 1  # which no prefix needs
