"""`PrefixStore`: names, versions, damage, several writers."""

import json
import threading

import pytest
import torch

from prefixfast import Prefix, PrefixStore
from prefixfast.errors import ConfigError, DataError, UnknownPrefixError

NAMES = ["a", "A", "Ünïcode 名前 🙂", "../../etc/passwd", "a/b\\c", ".", "x" * 4000, "\udcff", " ", "a\nb", "CON"]


def prefix(seed: int = 0, rows: int = 3, **how) -> Prefix:
    g = torch.Generator().manual_seed(seed)
    return Prefix({f"self.{i}.{x}": torch.randn(rows, 2, 4, generator=g) for i in range(2) for x in "kv"}, **{"pos_start": rows, **how})


def test_any_name_comes_back(tmp_path):
    store = PrefixStore(tmp_path / "s")
    for i, name in enumerate(NAMES):
        put = store.put(name, prefix(i, linearizer={"task": "e2e"}))
        assert put.digest == prefix(i).digest == store.get(name).digest == store[name].digest
        assert put.name == store.info(name).name == name
    again = PrefixStore(tmp_path / "s", read_only=True)
    assert sorted(again) == sorted(NAMES)
    assert len(again) == len(NAMES)
    assert all(p.is_relative_to(tmp_path / "s") for p in tmp_path.rglob("*.safetensors"))
    info = again.info("a")
    assert (info.length, info.pos_start, info.window, info.linearizer, info.shapes["self.1.v"]) == (3, 3, "slide", {"task": "e2e"}, (3, 2, 4))


def test_the_newest_version_counts_and_old_ones_go(tmp_path):
    store = PrefixStore(tmp_path, keep_versions=2)
    put = [store.put("a", prefix(i)) for i in range(5)]
    assert store["a"].digest == prefix(4).digest
    assert [p.folder.exists() for p in put] == [False, False, False, True, True]
    assert [p.folder.name for p in put] == [f"{i:06d}" for i in range(1, 6)]
    assert put[3].read().digest == prefix(3).digest, "who started with the version before can still read it"


def test_a_stored_folder_is_a_prefix_folder(tmp_path):
    folder = PrefixStore(tmp_path).put("a", prefix()).folder
    assert Prefix.from_pretrained(folder).digest == prefix().digest
    assert (folder / "adapter_config.json").exists()


def test_what_is_wrong_is_said(tmp_path):
    store = PrefixStore(tmp_path / "s")
    with pytest.raises(UnknownPrefixError, match="no prefix is named 'b'"):
        store.info("b")
    assert store.get("b") is None
    assert "b" not in store
    assert 5 not in store
    for name in ("", None, 5):
        with pytest.raises(ConfigError, match="not empty"):
            store.put(name, prefix())
    with pytest.raises(ConfigError, match="read-only"):
        PrefixStore(tmp_path / "s", read_only=True).put("a", prefix())
    with pytest.raises(ConfigError, match="keep_versions"):
        PrefixStore(tmp_path / "s", keep_versions=0)
    with pytest.raises(ConfigError, match="expected a directory"):
        PrefixStore(tmp_path / "absent", read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a directory"):
        PrefixStore(tmp_path / "file")


@pytest.mark.parametrize("damage", ["{", "[]", '{"name": "a"}', '{"name": "a", "shapes": {"x": [1]}}'])
def test_a_damaged_entry_is_named(tmp_path, damage):
    store = PrefixStore(tmp_path)
    (store.put("a", prefix()).folder / "entry.json").write_text(damage)
    with pytest.raises(DataError, match=r"entry\.json"):
        store.info("a")


def test_tensors_that_are_not_those_of_the_entry_are_refused(tmp_path):
    store = PrefixStore(tmp_path)
    put = store.put("a", prefix(1))
    entry = put.folder / "entry.json"
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "digest": "0" * 64}))
    with pytest.raises(DataError, match="not those of"):
        store.info("a").read()


def test_many_writers_lose_nothing(tmp_path):
    stores = [PrefixStore(tmp_path, keep_versions=100) for _ in range(4)]
    threads = [threading.Thread(target=lambda s=s, i=i: [s.put("a", prefix(10 * i + k)) for k in range(5)]) for i, s in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = stores[0].info("a").folder.parent
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}" for i in range(1, 21)], "no version is lost, nothing stays behind"
    digests = {Prefix.from_pretrained(p).digest for p in folder.iterdir()}
    assert digests == {prefix(10 * i + k).digest for i in range(4) for k in range(5)}
