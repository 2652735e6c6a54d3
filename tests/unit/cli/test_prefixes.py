"""`prefixfast prefixes`, `convert` and `doctor`: what they do, what they print, and how they exit."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import tiny
from forked import end, start
from prefixfast import Prefix, PrefixStore
from prefixfast.cli import main
from prefixfast.cli.output import printable
from prefixfast.store.store import WORK


@pytest.fixture
def filled(tmp_path, make_prefix) -> Path:
    store = PrefixStore(tmp_path / "s")
    store.put("ann", make_prefix(1, base={"name": "gpt2"}, training={"steps": 7}))
    store.put("ann", make_prefix(2, length=5, base={"name": "gpt2"}, training={"steps": 9}))
    store.put("Ünï\t[red]\x1b[2J\u202e\udcff", make_prefix(3, pos_start=0))
    return tmp_path / "s"


def lines(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def damage(folder: Path) -> None:
    path = next(p for p in folder.iterdir() if p.suffix == ".safetensors")
    path.write_bytes(path.read_bytes()[:-9])


def test_list(cli, filled):
    done = cli("prefixes", "list", filled)
    assert done.code == 0
    header, *rows = lines(done.out)
    assert header == ["name", "version", "length", "size", "base", "created"]
    assert {row[0]: row[1:5] for row in rows} == {
        "ann": ["2", "5", "3.8 KiB", "gpt2"],
        r"Ünï\t[red]\x1b[2J\u202e\udcff": ["1", "4", "3.0 KiB", "-"],
    }, "a name cannot steer a terminal, nor break a line into two"


def test_list_as_json_names_the_same(cli, filled, make_prefix):
    rows = json.loads(cli("prefixes", "list", filled, "--json").out)
    assert sorted(row["name"] for row in rows) == sorted(PrefixStore(filled))
    ann = next(row for row in rows if row["name"] == "ann")
    assert (ann["version"], ann["nbytes"], ann["digest"], ann["problem"]) == (
        2,
        3840,
        make_prefix(2, length=5).digest,
        None,
    )


def test_list_shows_damage_and_goes_on(cli, filled):
    (PrefixStore(filled).info("ann").folder / "entry.json").write_text("{")
    done = cli("prefixes", "list", filled)
    assert done.code == 3
    assert len(lines(done.out)) == 3
    assert "entry.json: expected JSON" in done.out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_table(filled):
    master, slave = os.openpty()

    def on_terminal() -> None:
        sys.stdout = os.fdopen(slave, "w", encoding="utf8")
        sys.argv = ["prefixfast", "prefixes", "list", str(filled)]
        os.environ.update(COLUMNS="160", TERM="xterm")
        try:
            main()
        finally:
            sys.stdout.flush()

    child = start(on_terminal)
    os.close(slave)
    shown = b""
    while chunk := _read(master):
        shown += chunk
    os.close(master)
    end(child)
    text = shown.decode()
    assert "┃" in text
    assert "3.8 KiB" in text
    assert r"[red]\x1b[2J\u202e" in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # the other end is closed
        return b""


def test_show(cli, filled, make_prefix):
    shown = json.loads(cli("prefixes", "show", filled, "ann", "--json").out)
    assert shown["digest"] == make_prefix(2, length=5).digest
    assert {
        k: shown[k] for k in ("length", "layers", "shape", "dtype", "pos_start", "window", "numbers", "training")
    } == {
        "length": 5,
        "layers": [0, 1, 2],
        "shape": [[5, 4, 8]],
        "dtype": ["float32"],
        "pos_start": 5,
        "window": "slide",
        "numbers": 960,
        "training": {"steps": 9},
    }
    assert [v["version"] for v in shown["versions"]] == [1, 2]
    assert Path(shown["folder"]).is_dir()
    assert json.loads(cli("prefixes", "show", filled, "ann", "--version", 1, "--json").out)["training"] == {"steps": 7}
    assert ["training", '{"steps": 9}'] in lines(cli("prefixes", "show", filled, "ann").out)


def test_add_and_roll_back(cli, tmp_path, make_prefix):
    for seed in (1, 2):
        make_prefix(seed).save_pretrained(tmp_path / "p")
        done = cli("prefixes", "add", tmp_path / "new" / "store", "b ob", tmp_path / "p")
        assert (done.code, done.out) == (0, f"b ob: version {seed}, digest {make_prefix(seed).digest}\n")
    store = PrefixStore(tmp_path / "new" / "store")
    back = json.loads(cli("prefixes", "rollback", store.path, "b ob", "--json").out)
    assert (back["version"], back["digest"]) == (3, make_prefix(1).digest)
    assert store["b ob"].digest == make_prefix(1).digest
    assert cli("prefixes", "rollback", store.path, "b ob", "--to", 2).out.startswith("b ob: version 4")
    assert [v.version for v in store.versions("b ob")] == [1, 2, 3, 4], "what another program wants to keep is kept"


def test_rm(cli, filled):
    asked = cli("prefixes", "rm", filled, "ann")
    assert (asked.code, "--yes" in asked.err) == (2, True)
    absent = cli("prefixes", "rm", filled, "ann", "bob", "--yes")
    assert (absent.code, "'bob'" in absent.err) == (1, True)
    assert "ann" in PrefixStore(filled), "nothing is deleted before all names are known"
    done = cli("prefixes", "rm", filled, "ann", "--yes", "--json")
    assert done.code == 0
    (receipt,) = json.loads(done.out)
    assert (receipt["name"], receipt["files"], len(receipt["digests"])) == ("ann", 8, 2)
    assert "ann" not in PrefixStore(filled)
    assert cli("prefixes", "verify", filled, "--absent", receipt["digests"][0]).code == 0


def test_rm_asks_on_a_terminal(cli, filled, monkeypatch):
    class Terminal:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            return self.answer

    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert cli("prefixes", "rm", filled, "ann").code == 130
    assert "ann" in PrefixStore(filled)
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert cli("prefixes", "rm", filled, "ann").code == 0
    assert "ann" not in PrefixStore(filled)


def test_verify(cli, filled, make_prefix):
    whole = cli("prefixes", "verify", filled)
    assert (whole.code, whole.out) == (0, f"{filled}: 3 versions, all whole\n")
    held = cli("prefixes", "verify", filled, "--absent", make_prefix(1).digest)
    assert held.code == 3
    assert f"holds {make_prefix(1).digest}" in held.out
    left = filled / WORK / ("0" * 16)
    left.mkdir()
    make_prefix(9).save_pretrained(left / "new")
    assert cli("prefixes", "verify", filled, "--absent", make_prefix(9).digest).code == 0, (
        "what a killed writer left is gone"
    )
    damage(PrefixStore(filled).info("ann").folder)
    found = cli("prefixes", "verify", filled)
    assert (found.code, len(lines(found.out))) == (3, 2)
    told = json.loads(cli("prefixes", "verify", filled, "--json").out)
    assert (told["ok"], told["versions"], [d["name"] for d in told["damaged"]]) == (False, 3, ["ann"])


def test_export_and_import(cli, filled, tmp_path):
    assert cli("prefixes", "export", filled, tmp_path / "out").code == 0
    assert cli("prefixes", "export", filled, tmp_path / "one", "ann").code == 0
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["ann"]
    shutil.copytree(tmp_path / "out" / "ann", tmp_path / "out" / "broken")
    (tmp_path / "out" / "broken" / "entry.json").unlink()
    damage(tmp_path / "out" / "broken")
    done = cli("prefixes", "import", tmp_path / "other", tmp_path / "out")
    assert done.code == 3
    assert [row[0] for row in lines(done.out)].count("ok") == 2
    assert [row[1] for row in lines(done.out) if row[0] == "refused"] == ["broken"]
    other = PrefixStore(tmp_path / "other")
    assert {n: p.digest for n, p in other.items()} == {n: p.digest for n, p in PrefixStore(filled).items()}


# ---- convert ----


@pytest.fixture
def tree(tmp_path, make_prefix) -> Path:
    """Two prefixes, an adapter of PEFT and one that is damaged, at several depths."""
    make_prefix(1).save_pretrained(tmp_path / "in" / "a")
    make_prefix(2, pos_start=0).save_pretrained(tmp_path / "in" / "b" / "c")
    model = tiny.make("gpt2")
    tiny.with_prefix(model, tiny.peft_table(model, 4, 3)).save_pretrained(tmp_path / "in" / "b" / "peft")
    make_prefix(4).save_pretrained(tmp_path / "in" / "bad")
    damage(tmp_path / "in" / "bad")
    return tmp_path / "in"


@pytest.mark.parametrize("verify", [(), ("--verify",)])
def test_convert_a_tree(cli, tree, tmp_path, verify):
    done = cli("convert", tree, tmp_path / "out", "--recursive", *verify)
    assert done.code == 3
    rows = {Path(row[1]).relative_to(tree).as_posix(): (row[0], row[3]) for row in lines(done.out)[1:]}
    assert {name: (result, why[:11]) for name, (result, why) in rows.items()} == {
        "a": ("ok", "PEFT reads "),
        "b/c": ("ok", "only prefix"),
        "b/peft": ("ok", "PEFT reads "),
        "bad": ("refused", "adapter_mod"),
    }
    for name in ("a", "b/c", "b/peft"):
        assert Prefix.from_pretrained(tmp_path / "out" / name).digest == Prefix.from_pretrained(tree / name).digest
    assert not (tmp_path / "out" / "bad").exists()
    weights = "b/peft/adapter_model.safetensors"
    assert (tmp_path / "out" / weights).stat().st_size == (tree / weights).stat().st_size


def test_convert_one(cli, tree, tmp_path):
    assert cli("convert", tree / "a", tmp_path / "out", "--verify", "--json").code == 0
    assert Prefix.from_pretrained(tmp_path / "out").digest == Prefix.from_pretrained(tree / "a").digest
    bad = cli("convert", tree / "bad", tmp_path / "none")
    assert (bad.code, "adapter_model.safetensors" in bad.err) == (1, True)
    assert not (tmp_path / "none").exists()


def test_convert_verifies_what_it_wrote(cli, tree, tmp_path, monkeypatch):
    real = Prefix.save_pretrained

    def save(prefix: Prefix, folder: Path) -> None:
        real(prefix, folder)
        damage(Path(folder))

    monkeypatch.setattr(Prefix, "save_pretrained", save)
    assert cli("convert", tree / "a", tmp_path / "1").code == 0
    done = cli("convert", tree / "a", tmp_path / "2", "--verify")
    assert (done.code, "the written folder cannot be read" in done.err) == (1, True)
    monkeypatch.setattr(Prefix, "save_pretrained", lambda prefix, folder: shutil.copytree(tree / "b" / "c", folder))
    assert "holds another prefix" in cli("convert", tree / "a", tmp_path / "3", "--verify").err


# ---- doctor ----


def test_doctor(cli):
    done = cli("doctor")
    assert done.code == 0
    told = dict(line for line in lines(done.out) if len(line) == 2)
    assert told["rust extension"] == "loads"
    assert told["op attn_decode"].startswith("rust")
    assert told["torch"].split(".")[0] == "2"
    assert int(told["threads"]) >= 1


def test_doctor_of_a_base(cli, folder, base):
    done = cli("doctor", folder, "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["base"] == str(folder)
    assert told["family"].startswith("gpt2: parity")
    assert (told["layers"], told["heads"]) == (3, ["4 query and 4 kv heads of 8"])
    assert told["dtype"] == "float32"
    assert told["fingerprint"] == base.fingerprint["weights"]
    assert told["prefix of 10, numbers"] == 3 * 2 * 10 * 4 * 8
    assert told["prefix of 10, bytes in an engine"] == 4 * told["prefix of 10, numbers"]


def test_doctor_of_a_base_that_does_not_load_says_what_it_knows(cli, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = cli("doctor", tmp_path)
    assert done.code == 1
    assert "rust extension\tloads" in done.out
    assert "cannot be loaded" in done.err


def test_doctor_without_the_rust_extension(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefixfast._rust", None)
    done = cli("doctor")
    assert done.code == 1
    assert "rust extension\tdoes not load" in done.out


# ---- mistakes ----

MISTAKES = {
    "no such store": (("prefixes", "list", "{tmp}/none"), 1, "expected a directory"),
    "a store that is a file": (("prefixes", "add", "{tmp}/file", "a", "{tree}/a"), 1, "expected a directory"),
    "no such name": (("prefixes", "show", "{s}", "bob"), 1, "no prefix is named 'bob'"),
    "an empty name": (("prefixes", "show", "{s}", ""), 1, "not empty"),
    "no such version": (("prefixes", "show", "{s}", "ann", "--version", "9"), 1, "has no version 9; it has 1, 2"),
    "a version that is a word": (("prefixes", "show", "{s}", "ann", "--version", "x"), 2, "--version"),
    "roll back to nothing": (("prefixes", "rollback", "{s}", "ann", "--to", "9"), 1, "has no version 9"),
    "roll back in no store": (("prefixes", "rollback", "{tmp}/none", "ann"), 1, "expected a store"),
    "delete in no store": (("prefixes", "rm", "{tmp}/none", "ann", "--yes"), 1, "expected a store"),
    "add what is no prefix": (("prefixes", "add", "{tmp}/new", "a", "{tmp}"), 1, "adapter_config.json"),
    "keep nothing": (("prefixes", "add", "{s}", "a", "{tree}/a", "--keep-versions", "0"), 1, "keep_versions"),
    "a digest that is none": (("prefixes", "verify", "{s}", "--absent", "x"), 1, "absent: expected the digest"),
    "export into itself": (("prefixes", "export", "{s}", "{s}/out"), 1, "lies in the store itself"),
    "export nobody": (("prefixes", "export", "{s}", "{tmp}/none", "bob"), 1, "'bob'"),
    "import nothing": (("prefixes", "import", "{s}", "{tmp}/none"), 1, "expected a folder of adapter folders"),
    "import one": (("prefixes", "import", "{s}", "{tree}/a"), 1, "is an adapter folder itself"),
    "an unknown command": (("prefixes", "drop", "{s}"), 2, "No such command"),
    "convert nothing": (("convert", "{tmp}/none", "{tmp}/out"), 1, "no such folder"),
    "convert no tree": (("convert", "{tmp}/none", "{tmp}/out", "--recursive"), 1, "SRC: expected a folder"),
    "convert a tree without adapters": (
        ("convert", "{tmp}/empty", "{tmp}/out", "--recursive"),
        1,
        "no adapter folder in",
    ),
    "convert into itself": (("convert", "{tree}", "{tree}/out", "--recursive"), 1, "lies in SRC"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message_and_changes_nothing(cli, filled, tree, tmp_path, arguments, code, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    got = cli(*(a.format(s=filled, tree=tree, tmp=tmp_path) for a in arguments))
    assert got.code == code, got
    assert message in got.err
    assert "Traceback" not in got.err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_full_disk_is_one_message(cli, filled, tree, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prefixfast.store.store.write_file", full)
    done = cli("prefixes", "add", filled, "ann", tree / "a")
    assert (done.code, "No space left on device" in done.err) == (1, True)
    assert PrefixStore(filled).info("ann").version == 2


def test_an_interrupt_exits_with_130(cli, filled, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PrefixStore, "verify", interrupt)
    assert cli("prefixes", "verify", filled).code == 130


def test_printable():
    assert printable("a\nb\x1b\u202e\udcff名") == r"a\nb\x1b\u202e\udcff名"
    assert printable(None) == "-"
    assert printable({"a": [1, None]}) == '{"a": [1, null]}'
