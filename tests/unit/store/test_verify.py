"""`PrefixStore.verify`, damaged versions, and traces of deleted prefixes."""

import json
import shutil

import pytest

from prefixfast import PrefixStore
from prefixfast.errors import ConfigError, DataError
from prefixfast.store import Outcome, StoredPrefix
from prefixfast.store.store import WORK
from stored import cut, prefix


def test_verify_of_an_intact_store_finds_nothing(tmp_path):
    store = PrefixStore(tmp_path)
    for i in range(3):
        store.put("a", prefix(i))
        store.put("b", prefix(i, pos_start=0))
    check = store.verify()
    assert (check.ok, check.versions, check.damaged) == (True, 4, ())


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def change(**fields):
    def edit(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


# A file of version 2 of "a", its damage, the error message, and whether reading the entry alone finds the damage.
DAMAGE = {
    "no entry": ("entry.json", lambda p: p.unlink(), r"entry\.json is missing", True),
    "half an entry": ("entry.json", cut, r"entry\.json: expected JSON", True),
    "a list": ("entry.json", lambda p: p.write_text("[]"), "expected a JSON object", True),
    "no fields": ("entry.json", lambda p: p.write_text('{"name": "a"}'), r"entry\.json: shapes: expected", True),
    "deep": ("entry.json", lambda p: p.write_text('{"a":' * 100_000), r"entry\.json", True),
    "bytes": ("entry.json", lambda p: p.write_bytes(b"\xff\xfe"), r"entry\.json", True),
    "another's name": ("entry.json", change(name="b"), r"entry\.json: name: .*got 'b'", True),
    "shapes of no numbers": ("entry.json", change(shapes={"self.0.k": [1, 2, "x"]}), "shapes", True),
    "shapes of two": ("entry.json", change(shapes={"self.0.k": [1, 2]}), "shapes", True),
    "no shapes": ("entry.json", change(shapes={}), "shapes", True),
    "a huge position": ("entry.json", change(pos_start=-1), "pos_start", True),
    "a window of another kind": ("entry.json", change(window=["slide"]), "window", True),
    "a short digest": ("entry.json", change(digest="0"), "digest", True),
    "no decoding": ("entry.json", change(decoding=None), "decoding", True),
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
def test_damage_is_an_error_that_names_the_file(tmp_path, damage):
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
    assert store["b"].digest == prefix(5).digest, "other names can be read"
    assert store.put("a", prefix(3)).version == 3
    assert store["a"].digest == prefix(3).digest, "a new version can be read"


def test_a_version_under_another_name_is_refused(tmp_path):
    """Moved folders never make one name serve the prefix of another."""
    store = PrefixStore(tmp_path)
    ann, bob = store.put("ann", prefix(1)), store.put("bob", prefix(2))
    shutil.copytree(ann.folder, bob.folder.parent / "000002")
    with pytest.raises(DataError, match=r"entry\.json: name: .*got 'ann'"):
        store["bob"]
    assert len(store.verify().damaged) == 1


def test_a_version_that_is_a_link_to_another_store_is_refused(tmp_path):
    ours, theirs = PrefixStore(tmp_path / "1"), PrefixStore(tmp_path / "2")
    link, target = ours.put("ann", prefix(1)).folder, theirs.put("bob", prefix(2)).folder
    shutil.rmtree(link)
    link.symlink_to(target)
    with pytest.raises(DataError, match=r"name: .*got 'bob'"):
        ours["ann"]
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(DataError, match="cannot be read"):
        ours["ann"]
    assert not ours.verify().ok


# ---- traces of a deleted prefix ----

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
    "tensors without a configuration": lambda root, put: shutil.copy(
        put.folder / "adapter_model.safetensors", root / "lost.safetensors"
    ),
    "a link": lambda root, put: (root / "link").symlink_to("/etc/hosts"),
}


@pytest.mark.parametrize("hiding", HIDING)
def test_verify_finds_traces_of_a_deleted_prefix(tmp_path, hiding):
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


def test_verify_finds_no_trace_of_an_absent_prefix(tmp_path):
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


# ---- places ----


def test_the_report_names_the_places_and_further_ones_are_searched(tmp_path):
    store, one = PrefixStore(tmp_path / "s"), prefix(1)
    store.put("a", one)
    one.save_pretrained(tmp_path / "run" / "a")
    checkpoint = tmp_path / "run" / "checkpoint" / "0"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"finished": {"a": {"digest": one.digest}}}))
    (checkpoint / "state.safetensors").write_bytes(b"of another form")
    assert store.delete("a").place == str(tmp_path / "s")
    check = store.verify(absent=one.digest)
    assert (check.ok, check.searched) == (True, (str(tmp_path / "s"),))
    assert store.verify().searched == ()
    check = store.verify(absent=one.digest, also=[tmp_path / "run"])
    assert check.searched == (str(tmp_path / "s"), str(tmp_path / "run"))
    assert check.damaged == ()
    holding = {tmp_path / "run" / "a", tmp_path / "run" / "a" / "prefixfast.json", checkpoint / "state.json"}
    assert set(check.holding) == set(map(str, holding))
    shutil.rmtree(tmp_path / "run" / "a")
    (checkpoint / "state.json").write_text("{}")
    assert store.verify(absent=one.digest, also=[tmp_path / "run", tmp_path / "s"]).ok


def test_a_place_that_cannot_be_searched_is_reported(tmp_path):
    store = PrefixStore(tmp_path / "s")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"?")
    check = store.verify(absent="0" * 64, also=[tmp_path / "base"])
    assert (check.ok, [d.path for d in check.damaged]) == (False, [str(tmp_path / "base")])


@pytest.mark.parametrize("also", ["run", ["nowhere"], [__file__]], ids=["a string", "nothing", "a file"])
def test_places_are_folders_beside_a_digest(tmp_path, also):
    store = PrefixStore(tmp_path)
    with pytest.raises(ConfigError, match="also: expected a"):
        store.verify(absent="0" * 64, also=also)
    with pytest.raises(ConfigError, match="also: expected absent"):
        store.verify(also=[tmp_path])
