"""`PrefixStore`: names, versions, rollback, deletion, wrong arguments."""

import dataclasses
import hashlib
import json
import os
import threading

import pytest

from prefixfast import Prefix, PrefixStore
from prefixfast.errors import ConfigError, DataError, UnknownPrefixError
from stored import cut, files, prefix

NAMES = [
    "a",
    "A",
    "Ünïcode 名前 🙂",
    "../../etc/passwd",
    "a/b\\c",
    ".",
    "..",
    "x" * 10_000,
    "\udcff",
    " ",
    "a\nb",
    "CON",
    "\u202e\u05e9\u05dc\u05d5\u05dd",
    "a\0b",
    "👩‍👩‍👧",
]


def test_any_name_round_trips(tmp_path):
    store = PrefixStore(tmp_path / "s")
    for i, name in enumerate(NAMES):
        put = store.put(name, prefix(i, task={"task": "e2e"}))
        assert put.digest == prefix(i).digest == store.get(name).digest == store[name].digest
        assert put.name == store.info(name).name == name
    again = PrefixStore(tmp_path / "s", read_only=True)
    assert sorted(again) == sorted(NAMES)
    assert len(again) == len(NAMES)
    assert {n: p.digest for n, p in again.items()} == {n: prefix(i).digest for i, n in enumerate(NAMES)}
    assert all(p.is_relative_to(tmp_path / "s") for p in tmp_path.rglob("*.safetensors"))
    info = again.info("a")
    assert (info.length, info.pos_start, info.window, info.task, info.shapes["self.1.v"]) == (
        3,
        3,
        "slide",
        {"task": "e2e"},
        (3, 2, 4),
    )
    assert (info.version, info.nbytes) == (1, prefix().nbytes)
    for name in NAMES[1:]:
        store.delete(name)
    assert list(again) == ["a"]


def test_the_newest_version_is_read_and_old_ones_are_removed(tmp_path):
    store = PrefixStore(tmp_path, keep_versions=2)
    put = [store.put("a", prefix(i)) for i in range(5)]
    assert store["a"].digest == prefix(4).digest
    assert [p.folder.exists() for p in put] == [False, False, False, True, True]
    assert [p.folder.name for p in put] == [f"{i:06d}" for i in range(1, 6)]
    assert put[3].read().digest == prefix(3).digest, "a reader of the version before can still read it"
    assert [v.version for v in store.versions("a")] == [4, 5]


def test_versions_are_ordered_by_number_and_not_by_text(tmp_path):
    folder = PrefixStore(tmp_path).put("a", prefix(1)).folder
    folder.rename(folder.parent / "999999")
    store = PrefixStore(tmp_path)
    assert [store.put("a", prefix(i)).version for i in (2, 3)] == [1000000, 1000001]
    assert [v.digest for v in store.versions("a")] == [prefix(2).digest, prefix(3).digest]


def test_a_stored_folder_is_a_prefix_folder(tmp_path):
    folder = PrefixStore(tmp_path).put("a", prefix()).folder
    assert Prefix.from_pretrained(folder).digest == prefix().digest
    assert (folder / "adapter_config.json").exists()


def test_put_returns_the_same_entry_as_info(tmp_path):
    store = PrefixStore(tmp_path)
    put = store.put(
        "a", prefix(base={"name": "b", "config": {"heads": (1, 2)}}, decoding={"num_beams": 5}, training={"steps": 3})
    )
    info = store.info("a")
    assert dataclasses.asdict(put) == dataclasses.asdict(info)
    assert info.read().training == {"steps": 3}


# ---- rollback ----


def test_a_rollback_is_a_new_version_and_can_be_undone(tmp_path):
    store = PrefixStore(tmp_path)
    store.put("a", prefix(1, training={"steps": 1}))
    store.put("a", prefix(2))
    back = store.rollback("a")
    assert (back.version, back.digest) == (3, prefix(1).digest)
    assert store["a"].training == {"steps": 1}
    assert [v.digest for v in store.versions("a")] == [prefix(2).digest, prefix(1).digest]
    assert store.rollback("a").digest == prefix(2).digest


def test_a_rollback_to_a_version_number(tmp_path):
    store = PrefixStore(tmp_path, keep_versions=4)
    for i in range(1, 5):
        store.put("a", prefix(i))
    assert store.rollback("a", 2).digest == prefix(2).digest
    with pytest.raises(UnknownPrefixError, match=r"no version 1 in .*; it has 2, 3, 4, 5"):
        store.rollback("a", 1)


def test_a_damaged_version_can_be_rolled_back(tmp_path):
    store = PrefixStore(tmp_path)
    store.put("a", prefix(1))
    (store.put("a", prefix(2)).folder / "entry.json").write_text("{")
    with pytest.raises(DataError, match=r"entry\.json"):
        store["a"]
    assert store.rollback("a").digest == prefix(1).digest == store["a"].digest


def test_a_rollback_to_a_damaged_version_changes_nothing(tmp_path):
    store = PrefixStore(tmp_path)
    folder = store.put("a", prefix(1)).folder
    store.put("a", prefix(2))
    cut(folder / "adapter_model.safetensors")
    before = files(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        store.rollback("a")
    assert files(tmp_path) == before


# ---- deletion ----


def test_a_deletion_removes_all_files_and_reports_them(tmp_path):
    store = PrefixStore(tmp_path)
    store.put("keep", prefix(9))
    kept = files(tmp_path)
    for i in range(3):
        store.put("Ann", prefix(i))
    gone = {n: data for n, data in files(tmp_path).items() if n not in kept}
    receipt = store.delete("Ann")
    assert receipt.name_sha256 == hashlib.sha256(b"Ann").hexdigest()
    assert receipt.digests == (prefix(1).digest, prefix(2).digest)
    assert (receipt.files, receipt.bytes) == (len(gone), sum(map(len, gone.values())))
    assert files(tmp_path) == kept
    assert "Ann" not in store
    assert len(store) == 1
    assert "Ann" not in json.dumps(dataclasses.asdict(receipt))
    assert receipt.time.endswith("+00:00")
    with pytest.raises(UnknownPrefixError):
        store.delete("Ann")
    assert store.put("Ann", prefix(4)).version == 1


def test_a_damaged_name_can_be_deleted(tmp_path):
    store = PrefixStore(tmp_path)
    (store.put("a", prefix(1)).folder / "entry.json").write_text('{"digest": 5}')
    (store.put("a", prefix(2)).folder / "entry.json").unlink()
    assert store.delete("a").digests == (None, None)
    assert files(tmp_path) == {}


def test_a_file_that_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    store = PrefixStore(tmp_path)
    store.put("a", prefix())
    with monkeypatch.context() as m:
        m.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError("kept")))
        with pytest.raises(PermissionError):
            store.delete("a")
    assert "a" not in store
    assert not store.verify(absent=prefix().digest).ok, "verify finds the rest"
    PrefixStore(tmp_path)
    assert store.verify(absent=prefix().digest).ok


# ---- wrong arguments ----


def test_wrong_arguments_are_errors_that_change_nothing(tmp_path):
    store = PrefixStore(tmp_path / "s")
    store.put("a", prefix())
    before = files(tmp_path)
    for call in (store.info, store.versions, store.rollback, store.delete, store.__getitem__):
        with pytest.raises(UnknownPrefixError, match="no prefix is named 'b'"):
            call("b")
    assert store.get("b") is None
    assert "b" not in store
    assert 5 not in store
    for name in ("", None, 5):
        for call in (store.info, store.versions, store.rollback, store.delete, lambda name: store.put(name, prefix())):
            with pytest.raises(ConfigError, match="not empty"):
                call(name)
    for other in (None, "folder", store.info("a"), {}):
        with pytest.raises(ConfigError, match="prefix: expected a Prefix"):
            store.put("a", other)
    with pytest.raises(ConfigError, match="no version before 1"):
        store.rollback("a")
    with pytest.raises(UnknownPrefixError, match="no version 7"):
        store.rollback("a", 7)
    assert files(tmp_path) == before


def test_a_read_only_store_writes_nothing(tmp_path):
    PrefixStore(tmp_path / "s").put("a", prefix())
    before = sorted(tmp_path.rglob("*"))
    store = PrefixStore(tmp_path / "s", read_only=True)
    calls = {
        "put": lambda: store.put("a", prefix()),
        "rollback": lambda: store.rollback("a"),
        "delete": lambda: store.delete("a"),
        "import_dir": lambda: store.import_dir(tmp_path),
    }
    for call in calls.values():
        with pytest.raises(ConfigError, match="read-only"):
            call()
    assert store["a"].digest == prefix().digest
    assert store.verify(absent=prefix(1).digest).ok
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    for keep in (0, -1, "2", None, True):
        with pytest.raises(ConfigError, match="keep_versions"):
            PrefixStore(tmp_path / "s", keep_versions=keep)
    with pytest.raises(ConfigError, match="expected a directory"):
        PrefixStore(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="expected a directory"):
            PrefixStore(path)


def test_other_folders_in_the_directory_are_left_alone(tmp_path):
    (tmp_path / "my" / "notes").mkdir(parents=True)
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "file").write_text("")
    (tmp_path / "ab" / ("0" * 64)).write_text("a file of that name")
    store = PrefixStore(tmp_path)
    put = store.put("a", prefix())
    for strange in ("notes", "9" * 200, "٣", "-1", "000001.bak"):
        (put.folder.parent / strange).mkdir()
    assert list(store) == ["a"]
    assert len(store) == 1
    assert store.verify().ok


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = PrefixStore("s")
    put = store.put("a", prefix())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store["a"].digest == put.read().digest == prefix().digest


def test_threads_that_put_one_name_lose_no_version(tmp_path):
    stores = [PrefixStore(tmp_path, keep_versions=100) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda s=s, i=i: [s.put("a", prefix(10 * i + k)) for k in range(5)])
        for i, s in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = stores[0].info("a").folder.parent
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}" for i in range(1, 21)], (
        "no version is lost, and no other file is left"
    )
    digests = {Prefix.from_pretrained(p).digest for p in folder.iterdir()}
    assert digests == {prefix(10 * i + k).digest for i in range(4) for k in range(5)}
