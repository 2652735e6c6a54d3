"""Each argument of the public calls with values that it does not expect: the documented error; the engine goes on."""

from __future__ import annotations

import contextlib
from typing import get_args, get_type_hints

import pytest

import hostile
import tiny
from prefixfast import (
    CapacityError,
    ConfigError,
    Engine,
    EngineConfig,
    GenerationParams,
    MethodConfig,
    Prefix,
    PrefixConfig,
    PrefixFastError,
    PrefixStore,
    TrainConfig,
    generate,
    load,
    train,
)
from prefixfast.config.options import Range
from prefixfast.data import TASKS, Task, find_task, read_rows, read_task, table_task
from prefixfast.data.check_data import check_data
from prefixfast.data.row_reader import RowReader
from prefixfast.errors import DataError

CONFIGS = (GenerationParams, EngineConfig, TrainConfig, PrefixConfig, MethodConfig)
FIELDS = [pytest.param(c, n, id=f"{c.__name__}.{n}") for c in CONFIGS for n in c.names()]
ROWS = [{"prompt": "ab", "completion": "cd"}]
SAMPLED = {"do_sample": True}
BESIDE = {  # options without which an option is refused
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seed", "num_return_sequences"), SAMPLED),
    "length_penalty": {"num_beams": 2},
    "early_stopping": {"num_beams": 2},
}


@pytest.fixture(params=[pytest.param("few"), pytest.param("all", marks=pytest.mark.long)], scope="module")
def values(request):
    return hostile.FEW if request.param == "few" else hostile.ALL


@pytest.fixture(scope="module")
def engine(base):
    with Engine(base, max_num_seqs=4, max_model_len=32) as made:
        yield made


@pytest.fixture(scope="module")
def alone(engine):
    return engine.generate([[5, 6]], max_new_tokens=3, progress=False)[0].token_ids


def refused(call, *, value) -> bool:
    """Whether a call raises an error of prefixfast. Any other error fails the test with the value's name."""
    try:
        call()
    except PrefixFastError as e:
        text = str(e)
    except BaseException as e:
        raise AssertionError(f"{hostile.name_of(value)}: {type(e).__name__}: {e}") from e
    else:
        return False
    assert 15 < len(text) < 1500, (hostile.name_of(value), text)
    return True


# ---- options ----


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_an_option_is_refused_or_plain(cls, name, values):
    for value in values:
        made, text = None, ""
        try:
            made = cls(**{name: value})
        except ConfigError as e:
            text = str(e)
        plain = type(getattr(made, name, None)) in (int, float, bool, str, tuple, type(None))
        assert plain if made else text.startswith(f"{cls.__name__}."), hostile.name_of(value)


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_every_option_with_numbers_has_a_range_that_its_tensors_hold(cls, name):
    within, hint = cls.__dataclass_fields__[name].metadata["within"], get_type_hints(cls)[name]
    kinds = {*(get_args(hint) or (hint,))}
    if kinds.isdisjoint((int, float)):
        assert within is None
        return
    assert isinstance(within, Range)
    assert -within.high <= within.low < within.high < (3.5e38 if float in kinds else 2**63)
    for beyond in (within.high * 2 + 1, 10**400, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            cls(**{name: beyond})


def options_of_generation(name, value):
    return {"max_new_tokens": 3, **BESIDE.get(name, {}), name: value}


@pytest.mark.parametrize("name", GenerationParams.names())
def test_an_option_of_generation_fails_its_own_call(engine, alone, values, name):
    for value in values:
        options = options_of_generation(name, value)
        refused(lambda options=options: engine.generate([[5, 6]], progress=False, **options), value=value)
    assert engine.generate([[5, 6]], max_new_tokens=3, progress=False)[0].token_ids == alone


@pytest.mark.parametrize("name", GenerationParams.names())
@pytest.mark.parametrize("place", ["params", "decoding"])
def test_an_option_of_generation_fails_its_own_request(engine, alone, make_prefix, values, name, place):
    """All values in one batch, between two requests without them."""
    rows, prefixes, shown = [[5, 6]], [None], [""]
    for value in values:
        options, row, prefix = options_of_generation(name, value), [5, 6], None
        if place == "params":
            row = {"input_ids": [5, 6], "params": options}
        else:
            try:
                prefix = make_prefix(decoding=options)
            except DataError:  # the prefix is refused, since no file can hold the value
                continue
        rows, prefixes, shown = [*rows, row], [*prefixes, prefix], [*shown, hostile.name_of(value)]
    call = {} if name == "max_new_tokens" else {"max_new_tokens": 3}
    made = engine.generate([*rows, [5, 6]], [*prefixes, None], on_error="return", progress=False, **call)
    for good in (made[0], made[-1]):
        assert good.error is None
        assert good.token_ids[:3] == alone
    for i, bad in enumerate(made[1:-1], start=1):
        assert bad.error is None or bad.error.startswith((f"RequestError: request {i}", "CapacityError: ")), shown[i]


@pytest.mark.parametrize("name", EngineConfig.names())
def test_an_option_of_an_engine_is_refused_or_works(base, alone, values, name):
    def run(value):
        with Engine(base, **{"max_num_seqs": 2, "max_model_len": 32, name: value}) as made:
            assert made.generate([[5, 6]], max_new_tokens=3, progress=False)[0].token_ids == alone

    for value in values:
        refused(lambda value=value: run(value), value=value)


@pytest.mark.long
@pytest.mark.parametrize("name", [*TrainConfig.names(), *PrefixConfig.names(), *MethodConfig.names()])
def test_an_option_of_training_is_refused_or_works(base, name):
    common = {"init": "random", "prefix_length": 2, "max_steps": 1, "progress": False}
    for value in hostile.ALL:
        for how in ({name: value}, {"overrides": {"a": {name: value}}}, {"sweep": {name: [value]}}):
            refused(lambda how=how: train(base, {"a": ROWS}, **{**common, **how}), value=value)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e39, "do_sample": True},
        {"length_penalty": 1e39, "num_beams": 2},
        {"length_penalty": 60.0, "num_beams": 2},
        {"num_beams": 10**400},
        {"repetition_penalty": 1e-45},
        {"min_p": 1e-45, "do_sample": True},
        {"temperature": 2**63, "do_sample": True},
    ],
    ids=str,
)
def test_numbers_beyond_the_tensors(engine, alone, options):
    def row(params):
        return {"input_ids": [5, 6], "params": params}

    good, bad = engine.generate([row({}), row(options)], max_new_tokens=100 // 5, on_error="return", progress=False)
    assert good.token_ids[:3] == alone
    assert bad.error is None if options.get("temperature") == 2**63 else bad.error.startswith("RequestError: request 1")


# ---- arguments of calls ----

REQUEST_KEYS = (
    "input_ids",
    "mr",
    "table",
    "triples",
    "document",
    "messages",
    "text",
    "params",
    "prefix",
    "id",
    "tools",
)
SUBMITTED = ("tenant", "priority", "timeout", "params", "logits_processor")


def calls_of_an_engine(engine, value):
    """Calls of an engine, each with the value in one place."""
    few = {"max_new_tokens": 2}
    for name in SUBMITTED:
        yield f"submit {name}", lambda name=name: engine.submit([5, 6], **few, **{name: value}).result(timeout=20)
        yield f"stream {name}", lambda name=name: list(engine.stream([5, 6], **few, **{name: value}))
    yield "submit item", lambda: engine.submit(value, **few).result(timeout=20)
    yield "submit prefix", lambda: engine.submit([5], value, **few).result(timeout=20)
    for name in ("batch", "prefixes", "params", "logits_processor", "on_error"):
        how = {"batch": [[5]], "progress": False, **few, name: value}
        yield f"generate {name}", lambda how=how: engine.generate(**how)
    yield "generate item", lambda: engine.generate([value], progress=False, **few)
    for key in REQUEST_KEYS:
        yield f"row {key}", lambda key=key: engine.generate([{key: value}], progress=False, **few)
        row = {"prompt": "a", "completion": "b", key: value}
        yield f"score {key}", lambda row=row: engine.score([row])
    for key in ("labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids"):
        row = {"input_ids": [5, 6], key: value}
        yield f"row {key}", lambda row=row: engine.generate([row], progress=False, **few)
        yield f"score {key}", lambda row=row: engine.score([row])
    for name in ("batch", "prefixes", "targets", "end_token"):
        how = {"batch": [[5, 6]], "targets": [[5]], name: value}
        yield f"score {name}", lambda how=how: engine.score(**how)
    yield "target", lambda: engine.score([[5, 6]], targets=[value])
    for name in ("pin", "unpin", "evict", "cancel"):
        yield name, lambda name=name: getattr(engine, name)(value)


def test_calls_of_an_engine_refuse_what_they_do_not_expect(base, alone, values):
    with Engine(base, max_num_seqs=4, max_model_len=32) as made:
        for value in values:
            for _, call in calls_of_an_engine(made, value):
                refused(call, value=value)
            assert made.generate([[5, 6]], max_new_tokens=3, progress=False)[0].token_ids == alone


def test_a_wait_refuses_what_is_no_time(engine, values):
    ticket = engine.submit([5, 6], max_new_tokens=3)
    for value in [*values, 1e300, "5", -1.0]:
        for wait in (ticket.result, ticket.future.exception):
            with contextlib.suppress(ConfigError, TimeoutError):
                wait(value)
    for value in ("5", 1e300, float("nan"), True):
        with pytest.raises(ConfigError):
            ticket.result(value)
    assert ticket.result(timeout=20) is ticket.result(-1.0)


@pytest.mark.parametrize("value", [5, "x", [1]], ids=ascii)
def test_wrong_parameters_are_named_as_the_argument_is(engine, value):
    for call in (
        lambda: engine.generate([[5]], params=value, progress=False),
        lambda: engine.submit([5], params=value),
        lambda: engine.generate([{"input_ids": [5], "params": value}], progress=False),
    ):
        with pytest.raises(PrefixFastError, match="params: "):
            call()


def calls_without_an_engine(base, store, prefix, value):
    """Further public calls, each with the value in one place."""
    for name in ("text", "prefix_length", "after", "model"):
        how = {"model": base, "text": "a", name: value}
        yield lambda how=how: Prefix.from_text(**how)
    for name in ("pos_start", "window", "base", "task", "decoding", "training"):
        how = {"kv": prefix.kv, "pos_start": 4, name: value}
        yield lambda how=how: Prefix(**how)
    yield lambda: Prefix(value, 1)
    yield lambda: Prefix({"self.0.k": value, "self.0.v": value}, 1)
    yield lambda: Prefix.from_pretrained(value)
    for name in ("prompts", "words", "rows"):
        how = {"prompts": [[5]], name: value}
        yield lambda how=how: prefix.inspect(base, **how)
    for name in ("dtype", "device", "revision", "backend", "trust_remote_code", "local_files_only", "model"):
        how = {"model": "no/such-base", name: value}
        yield lambda how=how: load(**how)
    yield lambda: generate([[5]], "known", model=base, store=value, progress=False, max_new_tokens=1)
    yield lambda: Engine(base, store=value, max_num_seqs=1).close()
    yield lambda: Engine(base, config=value, max_num_seqs=1).close()
    for name in ("info", "versions", "delete", "get", "__contains__"):
        yield lambda name=name: getattr(store, name)(value)
    yield lambda: store.put("x", value)
    yield lambda: store.rollback("known", value)
    yield lambda: store.verify(absent=value)
    yield lambda: store.import_dir(value)
    yield lambda: PrefixStore(store.path, keep_versions=value)
    yield lambda: PrefixStore(store.path, read_only=value)
    yield lambda: read_rows(value)
    yield lambda: read_rows(ROWS, encoding=value)
    yield lambda: find_task(value, ROWS[0])
    yield lambda: read_task(value, "no-file.csv", split="train")
    yield lambda: read_task("e2e", "no-file.csv", split=value)
    yield lambda: RowReader(split="train", task=value)
    yield lambda: RowReader(split=value, task="e2e")
    yield lambda: RowReader(split="train", task="e2e").read(value)
    yield lambda: check_data(value, "no-file.jsonl")
    yield lambda: check_data("e2e", value)
    for name in ("item", "separator", "prompt", "target", "init_text"):
        yield lambda name=name: table_task(**{name: value})
    for name in TASKS["prompt"].spec():
        yield lambda name=name: Task(**{"name": "x", name: value})
        yield lambda name=name: Task.from_spec({"name": "x", name: value})


def test_calls_without_an_engine_refuse_what_they_do_not_expect(base, make_prefix, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prefix, store = make_prefix(), PrefixStore(tmp_path / "store")
    store.put("known", prefix)
    for value in values:
        for call in calls_without_an_engine(base, store, prefix, value):
            refused(call, value=value)
    assert store["known"].digest == prefix.digest


ARGUMENTS = {
    "data": {},
    "task": {},
    "prefix_column": {},
    "encoding": {},
    "split": {"task": "e2e"},
    "eval_data": {},
    "init": {},
    "init_text": {"init": "text"},
    "on_top_of": {},
    "objective": {},
    "sweep": {},
    "overrides": {},
    "store": {},
    "resume": {},
    "on_error": {},
    "callbacks": {},
    "prefix_config": {},
    "config": {},
    "progress": {},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_train_is_refused_or_works(name, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    how = {"data": rows, "init": "random", "prefix_length": 2, "max_steps": 1, "progress": False, **ARGUMENTS[name]}
    with load(tiny.make("gpt2")) as base:
        for value in values:
            refused(lambda value=value: train(base, **{**how, name: value}), value=value)
        for key in ("input_ids", "labels", "attention_mask", "completion_mask") if name == "data" else ():
            for value in values:
                row = {**rows[0], key: value}
                refused(lambda row=row: train(base, **{**how, "data": [row]}), value=value)


def test_an_engine_that_no_memory_holds_is_a_capacity_error(base, monkeypatch):
    def empty(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr("prefixfast.engine.kv_arena.torch.empty", empty)
        with pytest.raises(CapacityError, match="max_num_seqs"):
            Engine(base, max_num_seqs=2**16, kv_cache_memory=2**62)
    Engine(base, max_num_seqs=2, max_model_len=32).close()
