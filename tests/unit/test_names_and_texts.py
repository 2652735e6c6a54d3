"""Errors name what the user meant: similar names, names of other libraries, and the user's own text unchanged."""

from __future__ import annotations

import copy
import json
import os

import pytest

import tiny
from prefixfast import (
    BaseMismatchError,
    ConfigError,
    DataError,
    Engine,
    EngineConfig,
    GenerationParams,
    Prefix,
    PrefixConfig,
    PrefixStore,
    RequestError,
    TrainConfig,
    TrainRun,
    UnknownPrefixError,
    generate,
    load,
    score,
    train,
)
from prefixfast.config.hints import HINTS
from prefixfast.data import Task, find_task, read_rows
from prefixfast.errors import printable, shown, suggestion

ROWS = [{"prompt": "a", "completion": "b"}]
FEW = {"max_new_tokens": 2, "progress": False}
ALL_NAMES = {n for c in (GenerationParams, EngineConfig, TrainConfig, PrefixConfig) for n in c.names()}


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_begins_with_an_option_that_exists(name):
    option = HINTS[name].split("=")[0].split(" ")[0]
    assert option in ALL_NAMES
    cls = next(c for c in (GenerationParams, EngineConfig, TrainConfig, PrefixConfig) if option in c.names())
    if name not in cls.names():
        with pytest.raises(ConfigError) as caught:
            cls.make(**{name: 1})
        assert f"did you mean {HINTS[name]}?" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda w: generate(["a"], model=w.base, stop="x"), ConfigError, "stop_strings"),
        (lambda w: generate(["a"], model=w.base, n=2), ConfigError, "num_return_sequences"),
        (lambda w: generate(["a"], model=w.base, top_logprobs=2), ConfigError, "logprobs"),
        (lambda w: generate(["a"], model=w.base, temprature=2), ConfigError, "temperature"),
        (lambda w: w.engine.submit("a", frequency_penalty=1.0), ConfigError, "repetition_penalty"),
        (
            lambda w: generate([{"prompt": "a", "params": {"max_tokens": 2}}], model=w.base),
            RequestError,
            "max_new_token",
        ),
        (lambda w: generate([{"promtp": "a"}], model=w.base), RequestError, "prompt"),
        (lambda w: score([{"prompt": "a", "completon": "b"}], model=w.base), RequestError, "completion"),
        (lambda w: w.store["alcie"], UnknownPrefixError, "alice"),
        (lambda w: w.store.info("alic"), UnknownPrefixError, "alice"),
        (lambda w: generate(["a"], "alcie", model=w.base, store=w.store), UnknownPrefixError, "alice"),
        (lambda w: w.engine.generate([{"prompt": "a", "prefix": "bbo"}], {"bob": w.prefix}), RequestError, "bob"),
        (lambda w: find_task("webnlq", {}), ConfigError, "webnlg"),
        (lambda w: Task.from_spec({"name": "x", "promt": ""}), ConfigError, "prompt"),
        (lambda w: train(w.base, ROWS, recipe="papr"), ConfigError, "paper"),
        (lambda w: train(w.base, ROWS, prefix_column="promt"), DataError, "prompt"),
        (lambda w: train(w.base, ROWS, on_error="rais"), ConfigError, "raise"),
        (lambda w: train(w.base, {"ada": ROWS}, overrides={"aba": {}}), ConfigError, "ada"),
        (lambda w: train(w.base, ROWS, sweep={"learning_rat": [1.0]}), ConfigError, "learning_rate"),
        (lambda w: load("x", backend="tritn"), ConfigError, "triton"),
        (lambda w: EngineConfig.make(temperature=1.0), ConfigError, "GenerationParams"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(base, make_prefix, tmp_path, call, error, name):
    class World:
        pass

    w = World()
    w.base, w.prefix, w.store = base, make_prefix(), PrefixStore(tmp_path / "store")
    w.store.put("alice", w.prefix)
    with Engine(base, max_num_seqs=2, max_model_len=32) as w.engine, pytest.raises(error) as caught:
        call(w)
    assert name in str(caught.value)


def test_nothing_is_suggested_where_nothing_is_similar():
    assert suggestion("zzz", ["a", "b"]) == "known are 'a', 'b'"
    assert suggestion("zzz", []) == "there is none"


def test_the_error_of_a_wrong_base_names_the_prefix_and_its_base(base, make_prefix, tmp_path):
    store = PrefixStore(tmp_path / "store")
    foreign = make_prefix(layers=2, base={"name": "org/other", "config": {"num_hidden_layers": 2}})
    store.put("alice", foreign)
    with Engine(base, store=store, max_num_seqs=2, max_model_len=32) as engine:
        for prefixes, name in (("alice", "alice"), ([foreign], foreign.digest[:12])):
            with pytest.raises(BaseMismatchError) as caught:
                engine.generate(["a"], prefixes, **FEW)
            assert name in str(caught.value)
            assert "org/other" in str(caught.value)
        good, bad = engine.generate(["a", "a"], [None, "alice"], on_error="return", **FEW)
    assert good.error is None
    assert bad.error.startswith("BaseMismatchError: ")


# ---- the user's text ----

TEXTS = [
    "C:\\new\\table",
    "100% {x} {0}",
    "[red]x[/red]",
    "request 0 and request 0",
    "it's",
    'a "b"',
    "Zoë 世界",
    "row 0: x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_users_text_in_an_error_is_unchanged(base, tmp_path, text):
    assert text in shown(text)
    bad = generate(["a", "b", {"prompt": "c", text: 1}], model=base, on_error="return", **FEW)[2]
    assert bad.error.startswith("RequestError: request 2: ")
    assert text in bad.error
    with pytest.raises(UnknownPrefixError) as unknown:
        PrefixStore(tmp_path / "store")[text]
    assert text in str(unknown.value)
    with pytest.raises(RequestError) as request:
        generate(["a", {"document": "a", "params": {"temperature": text}}], model=base, **FEW)
    assert text in str(request.value)
    with pytest.raises(ConfigError) as task:
        find_task(text, {})
    assert text in str(task.value)
    run = train(base, {"good": ROWS, text: [{"prompt": text}]}, init="random", max_steps=1, progress=False)
    assert text in run.failed[text]


def test_line_breaks_and_control_characters_are_shown():
    assert shown("a\nb\x1b[31m") == "'a\\nb\\x1b[31m'"
    assert printable("a\tb") == "a\\tb"
    assert shown("x" * 1000).endswith("…'")
    assert len(shown([["x" * 500] * 500] * 500)) <= 200


def test_the_representation_of_nested_values_ends():
    value: list = []
    for _ in range(60):
        value = [value, value]
    assert len(shown(value)) <= 200
    with pytest.raises(ConfigError):
        GenerationParams(temperature=value)


# ---- files ----

PLACES = {
    "no file": lambda p: None,
    "a directory": lambda p: p.mkdir(),
    "a broken link": lambda p: p.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
}
NAMES = ["a\0b", "a" * 300, "\ud800", ""]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"])
def test_a_file_of_rows_that_cannot_be_read_is_named(base, tmp_path, place, suffix):
    path = tmp_path / f"x{suffix}"
    PLACES[place](path)
    with pytest.raises(DataError, match=r"cannot be read|expected one file|expected a regular file"):
        read_rows(path)
    run = train(base, {"good": ROWS, "bad": path}, init="random", max_steps=1, progress=False)
    assert list(run) == ["good"]
    assert str(path) in run.failed["bad"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_path_that_cannot_be_is_refused_before_any_work(base, make_prefix, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    prefix = make_prefix()
    calls = {
        "rows": (lambda: read_rows(name), DataError),
        "train": (lambda: train(base, ROWS, output_dir=name, max_steps=1, progress=False), ConfigError),
        "store": (lambda: PrefixStore(name), ConfigError),
        "save": (lambda: prefix.save_pretrained(name), ConfigError),
        "to_peft": (lambda: prefix.to_peft(name), ConfigError),
        "load": (lambda: load(name), ConfigError),
        "from_pretrained": (lambda: Prefix.from_pretrained(name), DataError),
        "report": (lambda: TrainRun({}, {}, []).report(name), ConfigError),
        "plot": (lambda: TrainRun({}, {}, []).plot(f"{name}.png"), ConfigError),
        "recipe": (lambda: train(base, ROWS, recipe=f"{name}.yaml", progress=False), ConfigError),
    }
    for call, error in calls.values():
        with pytest.raises(error):
            call()
    assert list(tmp_path.iterdir()) == []


BROKEN = {
    "empty": lambda good: "",
    "truncated": lambda good: good[: len(good) // 2],
    "a list": lambda good: "[]",
    "no model": lambda good: "{}",
    "another type": lambda good: json.dumps({**json.loads(good), "model": 5}),
    "nested": lambda good: "[" * 100_000,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_tokenizer_is_a_config_error(folder, tmp_path, how):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_text(BROKEN[how](path.read_text()))
    with pytest.raises(ConfigError, match="tokenizer"):
        load(tmp_path, dtype="float32")


@pytest.mark.parametrize("end", ["x", [[1]], 1.5, {"a": 1}], ids=str)
def test_an_end_token_that_is_no_number_is_a_config_error(tokenizer, end):
    hf = tiny.make("gpt2")
    hf.generation_config = copy.deepcopy(hf.generation_config)
    hf.generation_config.eos_token_id = end
    with load(hf, tokenizer=tokenizer) as model, pytest.raises(ConfigError, match="eos_token_id"):
        Engine(model, max_num_seqs=1, max_model_len=16)
