"""`PrefixStore`: names, versions, roll-backs, deletion, damage."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading

import pytest
import torch

from prefixfast import Prefix, PrefixStore
from prefixfast.errors import ConfigError, DataError, UnknownPrefixError
from prefixfast.store import Outcome, StoredPrefix
from prefixfast.store.store import WORK

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


def prefix(seed: int = 0, rows: int = 3, **how) -> Prefix:
    g = torch.Generator().manual_seed(seed)
    return Prefix(
        {f"self.{i}.{x}": torch.randn(rows, 2, 4, generator=g) for i in range(2) for x in "kv"},
        **{"pos_start": rows, **how},
    )


def files(root) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_any_name_comes_back(tmp_path):
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


def test_the_newest_version_counts_and_old_ones_go(tmp_path):
    store = PrefixStore(tmp_path, keep_versions=2)
    put = [store.put("a", prefix(i)) for i in range(5)]
    assert store["a"].digest == prefix(4).digest
    assert [p.folder.exists() for p in put] == [False, False, False, True, True]
    assert [p.folder.name for p in put] == [f"{i:06d}" for i in range(1, 6)]
    assert put[3].read().digest == prefix(3).digest, "who started with the version before can still read it"
    assert [v.version for v in store.versions("a")] == [4, 5]


def test_numbers_count_not_their_spelling(tmp_path):
    folder = PrefixStore(tmp_path).put("a", prefix(1)).folder
    folder.rename(folder.parent / "999999")
    store = PrefixStore(tmp_path)
    assert [store.put("a", prefix(i)).version for i in (2, 3)] == [1000000, 1000001]
    assert [v.digest for v in store.versions("a")] == [prefix(2).digest, prefix(3).digest]


def test_a_stored_folder_is_a_prefix_folder(tmp_path):
    folder = PrefixStore(tmp_path).put("a", prefix()).folder
    assert Prefix.from_pretrained(folder).digest == prefix().digest
    assert (folder / "adapter_config.json").exists()


def test_what_put_returns_is_what_info_reads(tmp_path):
    store = PrefixStore(tmp_path)
    put = store.put(
        "a", prefix(base={"name": "b", "config": {"heads": (1, 2)}}, decoding={"num_beams": 5}, training={"steps": 3})
    )
    info = store.info("a")
    assert dataclasses.asdict(put) == dataclasses.asdict(info)
    assert info.read().training == {"steps": 3}


# ---- rolling back ----


def test_a_roll_back_is_a_new_version_and_can_be_undone(tmp_path):
    store = PrefixStore(tmp_path)
    store.put("a", prefix(1, training={"steps": 1}))
    store.put("a", prefix(2))
    back = store.rollback("a")
    assert (back.version, back.digest) == (3, prefix(1).digest)
    assert store["a"].training == {"steps": 1}
    assert [v.digest for v in store.versions("a")] == [prefix(2).digest, prefix(1).digest]
    assert store.rollback("a").digest == prefix(2).digest


def test_a_roll_back_to_a_number(tmp_path):
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


def test_a_roll_back_to_a_damaged_version_changes_nothing(tmp_path):
    store = PrefixStore(tmp_path)
    folder = store.put("a", prefix(1)).folder
    store.put("a", prefix(2))
    cut(folder / "adapter_model.safetensors")
    before = files(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        store.rollback("a")
    assert files(tmp_path) == before


# ---- deleting ----


def test_a_deletion_leaves_nothing_and_says_what_it_removed(tmp_path):
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
    assert not store.verify(absent=prefix().digest).ok, "it has not gone, and that can be seen"
    PrefixStore(tmp_path)
    assert store.verify(absent=prefix().digest).ok


# ---- checking ----


def test_a_whole_store_is_found_whole(tmp_path):
    store = PrefixStore(tmp_path)
    for i in range(3):
        store.put("a", prefix(i))
        store.put("b", prefix(i, pos_start=0))
    check = store.verify()
    assert (check.ok, check.versions, check.damaged) == (True, 4, ())


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def change(**fields):
    def edit(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


# A file of version 2 of "a", what happens to it, what is said, and whether reading the entry alone finds it.
DAMAGE = {
    "no entry": ("entry.json", lambda p: p.unlink(), r"entry\.json is missing", True),
    "half an entry": ("entry.json", cut, r"entry\.json: expected JSON", True),
    "a list": ("entry.json", lambda p: p.write_text("[]"), "expected a JSON object", True),
    "no fields": ("entry.json", lambda p: p.write_text('{"name": "a"}'), "expected name, shapes", True),
    "deep": ("entry.json", lambda p: p.write_text('{"a":' * 100_000), r"entry\.json", True),
    "bytes": ("entry.json", lambda p: p.write_bytes(b"\xff\xfe"), r"entry\.json", True),
    "another's name": ("entry.json", change(name="b"), r"entry\.json: name: got 'b'", True),
    "shapes of no numbers": ("entry.json", change(shapes={"self.0.k": [1, 2, "x"]}), "shapes", True),
    "shapes of two": ("entry.json", change(shapes={"self.0.k": [1, 2]}), "shapes", True),
    "no shapes": ("entry.json", change(shapes={}), "shapes", True),
    "a huge position": ("entry.json", change(pos_start=-1), "pos_start", True),
    "a window of another kind": ("entry.json", change(window=["slide"]), "window", True),
    "a short digest": ("entry.json", change(digest="0"), "digest", True),
    "decoding that is none": ("entry.json", change(decoding=None), "decoding", True),
    "another's digest": ("entry.json", change(digest="0" * 64), "differ in digest", False),
    "fewer rows than there are": (
        "entry.json",
        change(shapes={f"self.{i}.{x}": [2, 2, 4] for i in range(2) for x in "kv"}),
        "differ in shapes",
        False,
    ),
    "another position": ("entry.json", change(pos_start=7), "differ in pos_start", False),
    "another window": ("entry.json", change(window="always"), "differ in window", False),
    "other decoding": ("entry.json", change(decoding={"num_beams": 9}), "differ in decoding", False),
    "tensors cut": ("adapter_model.safetensors", cut, "damaged", False),
    "one bit": ("adapter_model.safetensors", flip, "tensors", False),
    "no tensors": ("adapter_model.safetensors", lambda p: p.unlink(), "adapter_model", False),
    "no conventions": ("prefixfast.json", cut, "prefixfast.json", False),
    "other conventions": ("prefixfast.json", change(window="always"), "prefixfast.json", False),
}


NAMELESS = ("no entry", "half an entry", "a list", "deep", "bytes", "another's name")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(tmp_path, damage):
    name, harm, message, at_once = DAMAGE[damage]
    store = PrefixStore(tmp_path)
    store.put("b", prefix(5))
    store.put("a", prefix(1))
    put = store.put("a", prefix(2))
    harm(put.folder / name)
    with pytest.raises(DataError, match=message):
        store["a"]
    with pytest.raises(DataError, match=message):
        store.get("a", "another")
    if at_once:
        with pytest.raises(DataError, match=message):
            store.info("a")
        with pytest.raises(DataError, match=message):
            store.versions("a")
        if damage in NAMELESS:
            with pytest.raises(DataError, match=r"entry\.json"):
                list(PrefixStore(tmp_path))
        else:
            assert sorted(PrefixStore(tmp_path)) == ["a", "b"]
    else:
        with pytest.raises(DataError, match=message):
            store.info("a").read()
    found = {type(x) for x in store.scan()}
    assert found == ({StoredPrefix, Outcome} if at_once else {StoredPrefix})
    check = store.verify()
    assert not check.ok
    assert [(d.path, d.ok) for d in check.damaged] == [(put.folder.relative_to(tmp_path).as_posix(), False)]
    assert check.versions == 3
    assert store["b"].digest == prefix(5).digest, "the others serve"
    assert store.put("a", prefix(3)).version == 3
    assert store["a"].digest == prefix(3).digest, "and so does the name again"


def test_a_version_under_another_name_is_refused(tmp_path):
    """Whoever moves folders about cannot make one name serve another's prefix."""
    store = PrefixStore(tmp_path)
    ann, bob = store.put("ann", prefix(1)), store.put("bob", prefix(2))
    shutil.copytree(ann.folder, bob.folder.parent / "000002")
    with pytest.raises(DataError, match=r"entry\.json: name: got 'ann'"):
        store["bob"]
    assert len(store.verify().damaged) == 1


def test_what_a_version_links_to_in_another_store_is_checked(tmp_path):
    ours, theirs = PrefixStore(tmp_path / "1"), PrefixStore(tmp_path / "2")
    link, target = ours.put("ann", prefix(1)).folder, theirs.put("bob", prefix(2)).folder
    shutil.rmtree(link)
    link.symlink_to(target)
    with pytest.raises(DataError, match="name: got 'bob'"):
        ours["ann"]
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(DataError, match="cannot be read"):
        ours["ann"]
    assert not ours.verify().ok


# ---- nothing is left ----

HIDING = {
    "an entry": lambda root, put: shutil.copy(put.folder / "entry.json", root / "copy.json"),
    "a version": lambda root, put: shutil.copytree(put.folder, root / "ab" / "copy"),
    "bare tensors of an adapter": lambda root, put: [
        (root / WORK / "0").mkdir(),
        *(
            shutil.copy(put.folder / n, root / WORK / "0" / n)
            for n in ("adapter_config.json", "adapter_model.safetensors")
        ),
    ],
    "tensors that nobody can read": lambda root, put: shutil.copy(
        put.folder / "adapter_model.safetensors", root / "lost.safetensors"
    ),
    "a link": lambda root, put: (root / "link").symlink_to("/etc/hosts"),
}


@pytest.mark.parametrize("hiding", HIDING)
def test_what_is_left_of_a_deleted_prefix_is_found(tmp_path, hiding):
    store = PrefixStore(tmp_path)
    store.put("b", prefix(2))
    put = store.put("a", prefix(1))
    HIDING[hiding](tmp_path, put)
    assert not store.verify(absent=put.digest).ok
    store.delete("a")
    check = store.verify(absent=put.digest)
    assert not check.ok
    assert len({*check.holding, *(d.path for d in check.damaged)}) in (1, 3), (
        "the copy, or its folder and the files in it that name the digest"
    )
    assert store.verify().ok


def test_an_absent_prefix_is_absent(tmp_path):
    store = PrefixStore(tmp_path)
    store.put("b", prefix(2))
    store.put("c", prefix(3, pos_start=0))
    assert store.verify(absent=prefix(1).digest).ok
    assert store.verify(absent=prefix(2).digest).holding
    assert any(h.endswith("000001") for h in store.verify(absent=prefix(3, pos_start=0).digest).holding), (
        "the tensors, not only their names"
    )
    for wrong in ("", "abc", "G" * 64, prefix(1).digest.upper()):
        with pytest.raises(ConfigError, match="absent: expected the digest"):
            store.verify(absent=wrong)


# ---- mistakes ----


def test_what_is_wrong_is_said(tmp_path):
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


def test_many_writers_lose_nothing(tmp_path):
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
        "no version is lost, nothing stays behind"
    )
    digests = {Prefix.from_pretrained(p).digest for p in folder.iterdir()}
    assert digests == {prefix(10 * i + k).digest for i in range(4) for k in range(5)}
