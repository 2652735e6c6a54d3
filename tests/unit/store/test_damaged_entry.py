"""Damaged fields of ``entry.json``: one error that names the field, and no other prefix or request is harmed."""

from __future__ import annotations

import json
import os

import pytest

from prefixfast import DataError, Engine, Prefix, PrefixFastError, PrefixStore

FIELDS = ("name", "shapes", "digest", "pos_start", "window", "base", "linearizer", "decoding", "nbytes", "created")
MISSING = object()
VALUES = [
    MISSING,
    None,
    True,
    0,
    -1,
    2**40,
    10**30,
    1.5,
    1e999,
    "",
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"x": 1},
    {"k": {"k": []}},
]
SHAPES = [
    {"self.0.k": [4, 4, 8]},
    {"self.0.k": [4, 4, 8], "self.0.v": [3, 4, 8]},
    {"self.0.k": [4, 4], "self.0.v": [4, 4]},
    {"self.0.k": [4, 4, 0], "self.0.v": [4, 4, 0]},
    {"self.0.k": [4, 4, True], "self.0.v": [4, 4, True]},
    {"self.0.k": [10**12, 4, 8], "self.0.v": [10**12, 4, 8]},
    {"self.x.k": [4, 4, 8], "self.x.v": [4, 4, 8]},
    {"../k": [4, 4, 8]},
    {"self.0.k": "448", "self.0.v": "448"},
]
BASES = [{"name": 5}, {"config": "x"}, {"config": []}, {"tokenizer": 1}, {"weights": {}}]
INNER = [
    *(("shapes", s) for s in SHAPES),
    *(("base", b) for b in BASES),
    ("decoding", {"temperature": 1e39}),
    ("decoding", {"num_beams": 10**30}),
    ("linearizer", {"name": "x", "linearizer": "5", "input": "table"}),
    ("linearizer", {"name": "x", "prompt": 5}),
    ("linearizer", {"nome": "x"}),
]


@pytest.fixture
def store(tmp_path, make_prefix):
    made = PrefixStore(tmp_path / "store")
    made.put("bad", make_prefix(1))
    made.put("good", make_prefix(2))
    return made


@pytest.fixture
def entry(store):
    return store.info("bad").folder / "entry.json"


def damage(store, entry, field, value):
    fields = json.loads(entry.read_text())
    fields.pop(field)
    if value is not MISSING:
        fields[field] = value
    entry.write_text(json.dumps(fields))
    return PrefixStore(store.path)


def check_others(base, store, expected):
    with Engine(base, store=store, max_num_seqs=4, max_model_len=32) as engine:
        bad, good = engine.generate(["a", "a"], ["bad", "good"], max_new_tokens=3, on_error="return", progress=False)
    assert good.error is None
    assert good.token_ids == expected
    return bad.error


@pytest.fixture
def expected(base, store):
    with Engine(base, store=store, max_num_seqs=4, max_model_len=32) as engine:
        return engine.generate(["a"], "good", max_new_tokens=3, progress=False)[0].token_ids


@pytest.mark.parametrize("field", FIELDS)
def test_a_damaged_field_harms_its_own_prefix_only(base, store, entry, expected, field):
    original = entry.read_text()
    for value in VALUES:
        opened = damage(store, entry, field, value)
        error = check_others(base, opened, expected)
        assert error is None or error.split(":")[0] in ("DataError", "RequestError", "BaseMismatchError"), value
        opened.verify()
        if error is not None and error.startswith("DataError: entry.json"):
            with pytest.raises(DataError, match=rf"entry\.json: {field}"):
                opened.info("bad")
        entry.write_text(original)


@pytest.mark.parametrize(("field", "value"), INNER, ids=str)
def test_a_damaged_value_inside_a_field_harms_its_own_prefix_only(base, store, entry, expected, field, value):
    opened = damage(store, entry, field, value)
    error = check_others(base, opened, expected)
    assert error.split(":")[0] in ("DataError", "RequestError", "BaseMismatchError")
    assert len(opened.verify().damaged) == 1 or field in ("decoding", "linearizer")


PLACES = {
    "a directory": lambda p: p.mkdir(),
    "a broken link": lambda p: p.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "no JSON": lambda p: p.write_text("{"),
    "a list": lambda p: p.write_text("[]"),
    "nested": lambda p: p.write_text("[" * 100_000),
    "digits": lambda p: p.write_text('{"nbytes": ' + "9" * 5000 + "}"),
    "no UTF-8": lambda p: p.write_bytes(b'{"name": "\xff"}'),
    "empty": lambda p: p.write_text(""),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_entry_that_cannot_be_read_harms_its_own_prefix_only(base, store, entry, expected, place):
    entry.unlink()
    PLACES[place](entry)
    opened = PrefixStore(store.path)
    assert check_others(base, opened, expected).split(":")[0] in ("DataError", "UnknownPrefixError")
    with pytest.raises(PrefixFastError, match=r"entry\.json"):
        opened.info("bad")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["prefixfast.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_a_prefix_that_cannot_be_read_is_named(make_prefix, tmp_path, place, name):
    make_prefix().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    PLACES[place](tmp_path / "a" / name)
    with pytest.raises(DataError, match=name):
        Prefix.from_pretrained(tmp_path / "a")
