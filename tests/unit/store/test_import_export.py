"""Import of adapter folders into a `PrefixStore`, and export of its prefixes to adapter folders."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import tiny
from prefixfast import Prefix, PrefixStore
from prefixfast.errors import ConfigError, DataError, UnknownPrefixError
from prefixfast.store.import_export import folder_name

NAMES = [
    "ann",
    "Ann",
    "bob.v2",
    "Ünï 名前 🙂",
    "../../etc/passwd",
    "..",
    "CON",
    "con",
    "con.txt",
    "x" * 10_000,
    "\udcff",
    "a/b",
    "a\\b",
    " ",
    ".git",
    "-rf",
    "a\0b",
]


def prefix(seed: int = 0, **how) -> Prefix:
    g = torch.Generator().manual_seed(seed)
    return Prefix(
        {f"self.{i}.{x}": torch.randn(3, 4, 8, generator=g) for i in range(3) for x in "kv"}, **{"pos_start": 3, **how}
    )


def saved(folder: Path, *seeds: int) -> Path:
    for seed in seeds:
        prefix(seed).save_pretrained(folder / f"p{seed}")
    return folder


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_export_and_import_round_trip(tmp_path):
    store = PrefixStore(tmp_path / "s")
    for i, name in enumerate(NAMES):
        store.put(name, prefix(i, pos_start=3 * (i % 2), task={"task": "e2e"}, training={"steps": i}))
    out = store.export_dir(tmp_path / "out")
    assert sorted(o.name for o in out) == sorted(NAMES)
    assert all(o.ok and Path(o.path).parent == tmp_path / "out" for o in out)
    other = PrefixStore(tmp_path / "other")
    taken = other.import_dir(tmp_path / "out")
    assert [o.why for o in taken] == ["version 1"] * len(NAMES)
    for i, name in enumerate(NAMES):
        assert other[name].digest == prefix(i, pos_start=3 * (i % 2)).digest
        assert other[name].training == {"steps": i}
        assert other.info(name).task == {"task": "e2e"}


def test_folder_names_work_on_every_file_system():
    made = {name: folder_name(name) for name in NAMES}
    assert (made["ann"], made["bob.v2"]) == ("ann", "bob.v2")
    assert len({unicodedata.normalize("NFKC", m).casefold() for m in made.values()}) == len(NAMES), (
        "also where case does not count"
    )
    for m in made.values():
        assert m.isascii()
        assert len(m) <= 100
        assert not set(m) & set('<>:"/\\|?*\0 ')
        assert m[0] not in ".-"
        assert m[-1] != "."
        assert m.partition(".")[0].lower() not in {"con", "nul", "aux", "prn"}


def test_peft_reads_an_exported_folder(tmp_path):
    store = PrefixStore(tmp_path / "s")
    store.put("ann", prefix(1))
    (made,) = store.export_dir(tmp_path / "out")
    model = PeftModel.from_pretrained(tiny.make("gpt2"), made.path)
    got = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(got.unflatten(1, (3, 2, 4, 8))[:, 1, 0], prefix(1).kv["self.1.k"])


def test_peft_adapters_are_imported_under_the_name_of_their_folder(tmp_path):
    model = tiny.make("gpt2")
    for name in ("ann", "Bob B."):
        tiny.with_prefix(model, tiny.peft_table(model, 4, len(name))).save_pretrained(tmp_path / "in" / name)
    store = PrefixStore(tmp_path / "s")
    assert [(o.name, o.ok) for o in store.import_dir(tmp_path / "in")] == [("Bob B.", True), ("ann", True)]
    assert store.info("ann").length == 4
    assert store["Bob B."].training == {"imported_from": "peft"}


def test_a_repeated_import_changes_nothing(tmp_path):
    store = PrefixStore(tmp_path / "s")
    saved(tmp_path / "in", 1, 2)
    store.import_dir(tmp_path / "in")
    before = contents(tmp_path / "s")
    assert [o.why for o in store.import_dir(tmp_path / "in")] == ["the store has it"] * 2
    assert contents(tmp_path / "s") == before
    prefix(3).save_pretrained(tmp_path / "in" / "p1")
    assert [o.why for o in store.import_dir(tmp_path / "in")] == ["version 2", "the store has it"]
    prefix(3, decoding={"num_beams": 2}).save_pretrained(tmp_path / "in" / "p1")
    assert store.import_dir(tmp_path / "in")[0].why == "version 3", "the same tensors, another use"


def test_a_repeated_export_replaces_its_own_files(tmp_path):
    store = PrefixStore(tmp_path / "s")
    store.put("Ann", prefix(1))
    (first,) = store.export_dir(tmp_path / "out")
    (Path(first.path) / "notes.txt").write_text("the user's")
    store.put("Ann", prefix(2, pos_start=0))
    assert store.export_dir(tmp_path / "out", ["Ann"])[0].ok
    assert Prefix.from_pretrained(first.path).digest == prefix(2, pos_start=0).digest
    assert (Path(first.path) / "notes.txt").exists()


def test_export_of_selected_names(tmp_path):
    store = PrefixStore(tmp_path / "s")
    for i, name in enumerate("abc"):
        store.put(name, prefix(i))
    assert [o.name for o in store.export_dir(tmp_path / "out", ["c", "a", "c"])] == ["c", "a"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "c"]


# ---- refused adapters ----


def break_weights(p: Path) -> None:
    (p / "adapter_model.safetensors").write_bytes((p / "adapter_model.safetensors").read_bytes()[:-9])


def config(**fields):
    def edit(p: Path) -> None:
        (p / "prefixfast.json").unlink()
        file = p / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


def replaced_by(make):
    def edit(p: Path) -> None:
        shutil.rmtree(p)
        make(p)

    return edit


def linked(file: str, target: str):
    def edit(p: Path) -> None:
        (p / file).unlink(missing_ok=True)
        (p / file).symlink_to(target)

    return edit


def fifo(p: Path) -> None:
    (p / "adapter_config.json").unlink()
    os.mkfifo(p / "adapter_config.json")


REFUSED = {
    "an empty folder": (replaced_by(lambda p: p.mkdir()), "adapter_config.json"),
    "a folder of something else": (
        replaced_by(lambda p: (p.mkdir(), (p / "model.safetensors").touch())),
        "adapter_config.json",
    ),
    "weights cut": (break_weights, "damaged"),
    "another kind of adapter": (config(peft_type="LORA"), "LORA"),
    "a classifier's": (config(task_type="SEQ_CLS"), "task_type CAUSAL_LM"),
    "a wrong size": (config(num_virtual_tokens=4), "num_virtual_tokens"),
    "a configuration that is a list": (
        lambda p: ((p / "prefixfast.json").unlink(), (p / "adapter_config.json").write_text("[]")),
        "expected a JSON object",
    ),
    "a pickle": (
        lambda p: ((p / "prefixfast.json").unlink(), (p / "adapter_model.safetensors").rename(p / "adapter_model.bin")),
        "pickle",
    ),
    "a link out": (replaced_by(lambda p: p.symlink_to(p.parent.parent / "secret")), "leads out of"),
    "a link to /": (replaced_by(lambda p: p.symlink_to("/")), "leads out of"),
    "a link to itself": (replaced_by(lambda p: p.symlink_to(p)), "a broken link"),
    "a link to nothing": (replaced_by(lambda p: p.symlink_to("nothing")), "a broken link"),
    "a link among links": (replaced_by(lambda p: (p.mkdir(), (p / "x").symlink_to(p / "x"))), "a broken link"),
    "weights that are another's": (
        linked("adapter_model.safetensors", "../../secret/adapter_model.safetensors"),
        "leads out of",
    ),
    "a configuration elsewhere": (linked("adapter_config.json", "/etc/hostname"), "leads out of"),
    "a pipe": (fifo, "neither a file nor a folder"),
    "an empty name": (
        lambda p: (p / "entry.json").write_text('{"name": ""}'),
        "name: expected a string that is not empty",
    ),
    "a name that is a number": (
        lambda p: (p / "entry.json").write_text('{"name": 5}'),
        "name: expected a string that is not empty",
    ),
    "an entry that is damaged": (lambda p: (p / "entry.json").write_text("{"), "entry.json: expected JSON"),
    "a name twice": (lambda p: (p / "entry.json").write_text('{"name": "p1"}'), "p1 has the same name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_bad_adapter_is_refused_and_the_others_are_imported(tmp_path, case):
    edit, message = REFUSED[case]
    saved(tmp_path / "in", 1, 2, 3)
    prefix(99).save_pretrained(tmp_path / "secret")
    edit(tmp_path / "in" / "p2")
    store = PrefixStore(tmp_path / "s")
    out = store.import_dir(tmp_path / "in")
    assert [o.ok for o in out] == [True, False, True]
    assert message in out[1].why
    assert out[1].path == str(tmp_path / "in" / "p2")
    assert sorted(store) == ["p1", "p3"]
    assert store["p1"].digest == prefix(1).digest
    assert store.verify(absent=prefix(99).digest).ok


def test_links_within_the_folder_are_followed(tmp_path):
    """The hub's cache keeps files as links."""
    saved(tmp_path / "in", 1)
    shutil.copytree(tmp_path / "in" / "p1", tmp_path / "in" / "p2")
    (tmp_path / "in" / ".blobs").mkdir()
    (tmp_path / "in" / "p2" / "adapter_model.safetensors").rename(tmp_path / "in" / ".blobs" / "w")
    (tmp_path / "in" / "p2" / "adapter_model.safetensors").symlink_to("../.blobs/w")
    (tmp_path / "in" / "p3").symlink_to("p1")
    (tmp_path / "in" / "README.md").write_text("a file beside the folders")
    out = PrefixStore(tmp_path / "s").import_dir(tmp_path / "in")
    assert [(o.name, o.ok) for o in out] == [("p1", True), ("p2", True), ("p3", True)]


def test_wrong_arguments_are_refused_before_any_write(tmp_path):
    store = PrefixStore(tmp_path / "s")
    store.put("a", prefix(1))
    before = contents(tmp_path)
    saved(tmp_path / "in", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder of adapter folders"):
        store.import_dir(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is an adapter folder itself"):
        store.import_dir(tmp_path / "in" / "p1")
    with pytest.raises(UnknownPrefixError, match="'b'"):
        store.export_dir(tmp_path / "out", ["a", "b"])
    with pytest.raises(ConfigError, match="expected a sequence of names, got 'ann'"):
        store.export_dir(tmp_path / "out", "ann")
    with pytest.raises(ConfigError, match="expected a folder or a path that does not exist"):
        store.export_dir(tmp_path / "file")
    for inside in (tmp_path / "s", tmp_path / "s" / "out"):
        with pytest.raises(ConfigError, match="lies in the store itself"):
            store.export_dir(inside)
    assert not (tmp_path / "out").exists()
    assert {n: d for n, d in contents(tmp_path).items() if n.startswith("s/")} == before


@pytest.mark.parametrize("way", ["a folder of the user's", "a file", "a link", "another name's export"])
def test_an_export_overwrites_nothing_else(tmp_path, way):
    store = PrefixStore(tmp_path / "s")
    store.put("ann", prefix(1))
    store.put("bob", prefix(2))
    target = tmp_path / "out" / "ann"
    target.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    if way == "a file":
        target.write_text("a user's")
    elif way == "a link":
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.mkdir()
        (target / "entry.json").write_text('{"name": "eve"}') if way == "another name's export" else (
            target / "thesis.txt"
        ).write_text("a user's")
    before = contents(tmp_path / "out")
    out = {o.name: o for o in store.export_dir(tmp_path / "out")}
    assert (out["ann"].ok, out["bob"].ok) == (False, True)
    assert "in the way" in out["ann"].why
    assert {n: d for n, d in contents(tmp_path / "out").items() if not n.startswith("bob/")} == before
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_damaged_version_is_not_exported(tmp_path):
    store = PrefixStore(tmp_path / "s")
    store.put("a", prefix(1))
    break_weights(store.put("b", prefix(2)).folder)
    (store.put("c", prefix(3)).folder / "entry.json").write_text("{")
    out = store.export_dir(tmp_path / "out")
    assert sorted((o.name or "?", o.ok) for o in out) == [("?", False), ("a", True), ("b", False)]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_an_export_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = PrefixStore(tmp_path / "s")
    store.put("a", prefix(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.export_dir(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_import_repairs_a_damaged_name(tmp_path):
    store = PrefixStore(tmp_path / "s")
    (store.put("p1", prefix(1)).folder / "entry.json").write_text("{")
    saved(tmp_path / "in", 1)
    assert store.import_dir(tmp_path / "in")[0].why == "version 2"
    assert store["p1"].digest == prefix(1).digest
    with pytest.raises(DataError):
        store.versions("p1")
