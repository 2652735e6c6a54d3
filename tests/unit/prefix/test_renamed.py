"""Names of version 0.1.0 warn and work, and its folders and store entries are read."""

from __future__ import annotations

import json

import pytest

from prefixfast import BaseMismatchError, DataError, Prefix, PrefixStore, load

TASK = {"name": "prompt", "prompt": "{src}\n"}
KEYS = ["base", "decoding", "digest", "linearizer", "not_peft_because", "pos_start", "training", "version", "window"]
ENTRY_KEYS = ["base", "created", "decoding", "digest", "linearizer", "name", "nbytes", "pos_start", "shapes", "window"]


def test_linearizer_is_task(make_prefix):
    prefix = make_prefix(task=TASK)
    with pytest.warns(FutureWarning, match=r"Prefix\.linearizer was renamed: use Prefix\.task"):
        assert prefix.linearizer == TASK


def test_not_peft_because_is_peft_incompatibility(make_prefix):
    prefix = make_prefix(pos_start=0)
    with pytest.warns(FutureWarning, match=r"Prefix\.not_peft_because was renamed: use Prefix\.peft_incompatibility"):
        assert prefix.not_peft_because == prefix.peft_incompatibility
    assert prefix.peft_incompatibility == "text starts at another position than the prefix's length"


def test_the_constructor_takes_linearizer(make_prefix):
    kv = make_prefix().kv
    with pytest.warns(FutureWarning, match=r"Prefix\(linearizer=...\) was renamed: use Prefix\(task=...\)"):
        prefix = Prefix(kv, pos_start=4, linearizer=TASK)
    assert prefix.task == TASK


def test_methods_of_a_model(folder, make_prefix):
    with load(folder) as base:
        with pytest.warns(FutureWarning, match=r"Model\.need_tokenizer was renamed: use Model\.require_tokenizer"):
            assert base.need_tokenizer() is base.require_tokenizer()
        with pytest.warns(FutureWarning, match=r"Model\.check_prefix was renamed: use prefixfast\.check_fits"):
            base.check_prefix(make_prefix())
        wrong = make_prefix(base={**base.fingerprint, "weights": "00"})
        with pytest.warns(FutureWarning), pytest.raises(BaseMismatchError):
            base.check_prefix(wrong)


def test_a_stored_prefix(tmp_path, make_prefix):
    store = PrefixStore(tmp_path)
    store.put("ann", make_prefix(task=TASK))
    with pytest.warns(FutureWarning, match=r"StoredPrefix\.linearizer was renamed: use StoredPrefix\.task"):
        assert store.info("ann").linearizer == TASK


@pytest.mark.parametrize("pos_start", [4, 0], ids=["peft", "own"])
def test_a_folder_has_the_keys_of_0_1_0(tmp_path, make_prefix, pos_start):
    prefix = make_prefix(task=TASK, pos_start=pos_start)
    prefix.save_pretrained(tmp_path)
    meta = json.loads((tmp_path / "prefixfast.json").read_text(encoding="utf8"))
    assert list(meta) == KEYS
    assert (meta["version"], meta["linearizer"]) == (1, TASK)
    assert Prefix.from_pretrained(tmp_path).task == TASK


def test_a_store_entry_has_the_keys_of_0_1_0(tmp_path, make_prefix):
    store = PrefixStore(tmp_path)
    store.put("ann", make_prefix(task=TASK))
    entry = json.loads((store.info("ann").folder / "entry.json").read_text(encoding="utf8"))
    assert list(entry) == ENTRY_KEYS
    assert entry["linearizer"] == TASK
    again = PrefixStore(tmp_path)
    assert (again.info("ann").task, again["ann"].task) == (TASK, TASK)


@pytest.mark.parametrize(
    ("edit", "said"), [({"linearizer": 5}, "linearizer: .*got 5"), ({}, "linearizer")], ids=["wrong", "missing"]
)
def test_errors_name_the_key_of_the_file(tmp_path, make_prefix, edit, said):
    store = PrefixStore(tmp_path)
    file = store.put("ann", make_prefix(task=TASK)).folder / "entry.json"
    entry = json.loads(file.read_text(encoding="utf8"))
    del entry["linearizer"]
    file.write_text(json.dumps(entry | edit), encoding="utf8")
    with pytest.raises(DataError, match=said):
        store.info("ann")
