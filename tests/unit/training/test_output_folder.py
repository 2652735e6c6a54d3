"""The output folder of a run: no result of an earlier run is lost, and what cannot be saved is refused at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prefixfast import Prefix, PrefixStore, train
from prefixfast.errors import ConfigError
from prefixfast.io.json_lines import json_bytes, json_line
from prefixfast.training import output_check

ROWS = [{"prompt": f"{a}=", "completion": a * 3} for a in "abcd"]
HOW = {"max_steps": 4, "batch_size": 2, "prefix_length": 2, "progress": False}
TWO = {"x": ROWS, "y": ROWS[:2]}


class Stop(Exception):
    """Stands for the death of a run."""


class StopAt:
    """Callback that ends a run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step, *_):
        if step == self.step:
            raise Stop


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def killed(base, data, out: Path, step: int, **how) -> None:
    with pytest.raises(Stop):
        train(base, data, output_dir=out, callbacks=[StopAt(step)], **{**HOW, **how})


@pytest.mark.parametrize("data", [ROWS, TWO], ids=["one", "two"])
def test_a_finished_run_is_refused_resumed_or_overwritten(base, tmp_path, data):
    out = tmp_path / "p"
    first = train(base, data, output_dir=out, **HOW)
    before = contents(out)
    with pytest.raises(ConfigError, match=r"--resume \(resume=True\).*--overwrite \(overwrite=True\)"):
        train(base, data, output_dir=out, seed=1, **HOW)
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        train(base, data, output_dir=out, seed=1, resume=True, **HOW)
    assert contents(out) == before
    again = train(base, data, output_dir=out, resume=True, **HOW)
    new = train(base, data, output_dir=out, seed=1, overwrite=True, **HOW)
    if data is ROWS:
        assert again.digest == first.digest != new.digest == Prefix.from_pretrained(out).digest
    else:
        assert again["x"].digest == first["x"].digest != new["x"].digest == Prefix.from_pretrained(out / "x").digest
    assert [line["step"] for line in map(json.loads, (out / "log.jsonl").open()) if "loss" in line] == [4]


@pytest.mark.parametrize("data", [ROWS, TWO], ids=["one", "two"])
def test_a_checkpoint_is_never_removed_without_overwrite(base, tmp_path, data):
    out = tmp_path / "p"
    killed(base, data, out, 3, save_steps=1)
    before = contents(out)
    assert "checkpoint/0/state.safetensors" in before
    with pytest.raises(ConfigError, match="a checkpoint"):
        train(base, data, output_dir=out, **HOW)
    assert contents(out) == before
    train(base, data, output_dir=out, overwrite=True, save_steps=None, **HOW)
    assert not (out / "checkpoint").exists()


def test_an_overwriting_run_keeps_each_old_prefix_until_its_new_one_is_saved(base, tmp_path):
    out = tmp_path / "p"
    old = train(base, {**TWO, "z": ROWS}, output_dir=out, **HOW)
    own = {"x": {"max_steps": 1}, "y": {"learning_rate": 0.0123}}
    killed(base, TWO, out, 2, overwrite=True, seed=1, overrides=own)
    found = {name: Prefix.from_pretrained(out / name).digest for name in "xyz"}
    assert (found["x"] == old["x"].digest, found["y"], found["z"]) == (False, old["y"].digest, old["z"].digest)
    new = train(base, TWO, output_dir=out, resume=True, seed=1, overrides=own, **HOW)
    assert new["x"].digest == found["x"]
    assert Prefix.from_pretrained(out / "y").digest == new["y"].digest != old["y"].digest
    assert Prefix.from_pretrained(out / "z").digest == old["z"].digest, "of a name that the new run does not have"


def test_files_of_others_stay(base, tmp_path):
    out = tmp_path / "p"
    train(base, ROWS, output_dir=out, **HOW)
    others = ("notes.txt", ".notes.tmp", "checkpoint/notes.txt", "checkpoint/0/notes.txt", "checkpoint/mine/state.json")
    for name in others:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    train(base, ROWS, output_dir=out, overwrite=True, save_steps=None, **HOW)
    assert {name: (out / name).read_text() for name in others} == dict.fromkeys(others, "mine")


@pytest.mark.parametrize("found", ["log.jsonl", "x", "checkpoint"])
def test_each_result_of_an_earlier_run_is_enough_to_refuse(base, tmp_path, make_prefix, found):
    if found == "x":
        make_prefix().save_pretrained(tmp_path / "x")
    elif found == "checkpoint":
        (tmp_path / "checkpoint" / "3").mkdir(parents=True)
        (tmp_path / "checkpoint" / "3" / "state.safetensors").write_text("?")
    else:
        (tmp_path / found).write_text("{}\n")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"'x'|{found}"):
        train(base, TWO, output_dir=tmp_path, **HOW)
    assert contents(tmp_path) == before
    if found == "x":
        with pytest.raises(ConfigError, match="no checkpoint to go on from; give --overwrite"):
            train(base, TWO, output_dir=tmp_path, resume=True, **HOW)
    assert train(base, TWO, output_dir=tmp_path, overwrite=True, **HOW)


def test_a_folder_without_results_is_no_earlier_run(base, tmp_path, make_prefix):
    (tmp_path / "log.jsonl").touch()
    (tmp_path / "notes.txt").write_text("mine")
    make_prefix().save_pretrained(tmp_path / "another")
    killed(base, TWO, tmp_path, 1)
    (tmp_path / "log.jsonl").write_text("")
    assert (tmp_path / "checkpoint" / "0" / "state.json").exists()
    train(base, TWO, output_dir=tmp_path, seed=3, **HOW)


def test_a_run_that_dies_before_its_first_checkpoint_is_not_resumed_as_another(base, tmp_path):
    own = {"x": {"max_steps": 1}}
    killed(base, TWO, tmp_path, 3, overrides=own)
    finished = Prefix.from_pretrained(tmp_path / "x").digest
    with pytest.raises(ConfigError, match="learning_rate was"):
        train(base, TWO, output_dir=tmp_path, resume=True, learning_rate=1e-5, overrides=own, **HOW)
    assert Prefix.from_pretrained(tmp_path / "x").digest == finished
    run = train(base, TWO, output_dir=tmp_path, resume=True, overrides=own, **HOW)
    assert run["x"].digest == finished


def test_resume_and_overwrite_need_a_folder_and_exclude_each_other(base, tmp_path):
    with pytest.raises(ConfigError, match="expected one of them"):
        train(base, ROWS, output_dir=tmp_path, resume=True, overwrite=True, **HOW)
    with pytest.raises(ConfigError, match="overwrite: expected output_dir"):
        train(base, ROWS, overwrite=True, **HOW)


def test_a_store_gets_a_new_version_without_overwrite(base, tmp_path):
    first = train(base, ROWS, store=tmp_path, **HOW)
    second = train(base, ROWS, store=tmp_path, seed=1, **HOW)
    versions = PrefixStore(tmp_path).versions("prefix")
    assert [v.digest for v in versions] == [first.digest, second.digest]


# ---- an adapter that is no prefix ----


def lora(folder: Path) -> bytes:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    config = json.dumps({"peft_type": "LORA"}).encode()
    (folder / "adapter_config.json").write_bytes(config)
    return config


def test_another_kind_of_adapter_is_never_replaced(base, tmp_path, make_prefix):
    config = lora(tmp_path / "x")
    for save in (make_prefix().save_pretrained, make_prefix().to_peft):
        with pytest.raises(ConfigError, match="PEFT adapter of type 'LORA'"):
            save(tmp_path / "x")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError, match="PEFT adapter of type 'LORA'"):
            train(base, TWO, output_dir=tmp_path, **how, **HOW)
        with pytest.raises(ConfigError, match="PEFT adapter of type 'LORA'"):
            train(base, ROWS, output_dir=tmp_path / "x", **how, **HOW)
    assert (tmp_path / "x" / "adapter_config.json").read_bytes() == config
    assert (tmp_path / "x" / "adapter_model.safetensors").read_bytes() == b"weights"


# ---- names ----


class Never:
    """Callback of a run that must not begin."""

    def on_train_begin(self, *_):
        pytest.fail("the run began")


BAD_NAMES = ["n" * 300, "\u00e9" * 121, "a\0b", "a/b", "\ud800", "..", "", "log.jsonl", ".x.tmp", ".x.previous"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_cannot_be_a_folder_is_refused_before_any_step(base, tmp_path, name):
    with pytest.raises(ConfigError, match=r"prefix name .* cannot be a folder"):
        train(base, {"good": ROWS, name: ROWS}, output_dir=tmp_path / "out", callbacks=[Never()], **HOW)
    assert list(tmp_path.iterdir()) == [], "no trace of the check"


def test_a_sweep_whose_names_are_too_long_is_refused_before_any_step(base, tmp_path):
    sweep = {"layers": [tuple(range(100)), (0,)]}
    with pytest.raises(ConfigError, match="cannot be a folder"):
        train(base, ROWS, sweep=sweep, output_dir=tmp_path / "out", callbacks=[Never()], **HOW)


def test_names_that_the_file_system_does_not_tell_apart_are_refused(base, tmp_path, monkeypatch):
    real, made = Path.mkdir, set()

    def mkdir(path: Path, *arguments, **how) -> None:
        if path.name.endswith(".xxxxxxxx.tmp"):
            if str(path).casefold() in made:
                raise FileExistsError(17, "File exists", str(path))
            made.add(str(path).casefold())
        real(path, *arguments, **how)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    for names in (("Ann", "ann"), ("x", "Checkpoint")):
        with pytest.raises(ConfigError, match="does not tell it apart"):
            train(base, dict.fromkeys(names, ROWS), output_dir=tmp_path, callbacks=[Never()], **HOW)


GOOD_NAMES = ["Ann", "ann", "a.", " b", "con", "\u00e9", "e\u0301", "-x", "n" * 200, "x\ny", "log", ".hidden"]


def test_other_names_are_folders(base, tmp_path):
    run = train(base, dict.fromkeys(GOOD_NAMES, ROWS), output_dir=tmp_path, **{**HOW, "max_steps": 1})
    assert set(run) == set(GOOD_NAMES)
    assert {n: Prefix.from_pretrained(tmp_path / n).digest for n in GOOD_NAMES} == {n: run[n].digest for n in run}


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "a/b", "\ud800", ".."], ids=ascii)
def test_a_store_takes_every_name(base, tmp_path, name):
    run = train(base, {name: ROWS, "bad": []}, store=tmp_path, **{**HOW, "max_steps": 1})
    assert PrefixStore(tmp_path)[name].digest == run[name].digest
    run.report(tmp_path / "report.md")
    run.plot(tmp_path / "plot.png")


@pytest.mark.parametrize("where", ["/proc/prefixfast", "file", "file/inside", "n" * 300, "a\0b"], ids=ascii)
def test_a_folder_that_cannot_be_written_is_refused_before_any_step(base, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / where
    if where.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs a file system that cannot be written")
    for data in (ROWS, TWO):
        with pytest.raises(ConfigError, match=r"output_dir|cannot be a folder"):
            train(base, data, output_dir=out, callbacks=[Never()], **HOW)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_in_the_place_of_a_prefix_is_refused_before_any_step(base, tmp_path):
    (tmp_path / "y").write_text("mine")
    for how in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="got a file"):
            train(base, TWO, output_dir=tmp_path, callbacks=[Never()], **how, **HOW)


def test_a_prefix_that_cannot_be_saved_does_not_lose_the_others(base, tmp_path, monkeypatch):
    real = Prefix.save_pretrained

    def save(prefix: Prefix, folder: Path, **how: bool) -> None:
        if Path(folder).name == "x":
            raise OSError(28, os.strerror(28))
        real(prefix, folder, **how)

    monkeypatch.setattr(Prefix, "save_pretrained", save)
    run = train(base, TWO, output_dir=tmp_path / "a", **HOW)
    assert list(run) == ["y"]
    assert "No space left" in run.failed["x"]
    assert "No space left" in json.loads((tmp_path / "a" / "failed.jsonl").read_text())["error"]
    with pytest.raises(OSError, match="No space left"):
        train(base, TWO, output_dir=tmp_path / "b", on_error="raise", **HOW)


# ---- text and numbers that JSON or UTF-8 cannot hold ----


def test_json_of_everything_is_utf_8_and_standard():
    value = {
        "a": [float("nan"), float("inf"), 1.5],
        "b": "\ud800 \u00e9",
        "c": (1, None, True),
        "d": {"e": -float("inf")},
    }
    text = json_bytes(value).decode()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, None, 1.5],
        "b": "\ud800 \u00e9",
        "c": [1, None, True],
        "d": {"e": None},
    }
    assert json_line("\u00e9") == '"\u00e9"\n'.encode()


def test_a_prefix_with_text_that_utf_8_cannot_hold_is_saved(tmp_path, make_prefix):
    training = {"note": "\ud800", "metrics": {"loss": float("nan")}}
    prefix = make_prefix(1, training=training, decoding={"stop_strings": ["\udfff"]})
    prefix.save_pretrained(tmp_path)
    read = Prefix.from_pretrained(tmp_path)
    assert (read.digest, read.decoding) == (prefix.digest, prefix.decoding)
    assert read.training == {"note": "\ud800", "metrics": {"loss": None}}
    json.loads((tmp_path / "prefixfast.json").read_text(), parse_constant=pytest.fail)


def test_the_check_itself_leaves_nothing_and_does_not_grow(tmp_path, monkeypatch):
    made, real = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: (made.append(path), real(path, *a, **k))[1])
    output_check.check_writable(tmp_path / "a" / "b", [f"user{i}" for i in range(2000)])
    assert list(tmp_path.iterdir()) == []
    assert len(made) < 2010
