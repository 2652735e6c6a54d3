"""Folders, glob patterns and several files on the command line, with a store alone."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from prefixfast import ConfigError, DataError, Folder, Prefix, PrefixStore
from prefixfast.cli.receipts import receipt_lines
from prefixfast.cli.row_files import named_files
from prefixfast.store.runs import run_folders

FAST = ("--max-steps", 2, "--batch-size", 2, "--prefix-length", 3, "--dtype", "float32", "--init", "random")
GOOD = "prompt,completion\na=,aaa\nb=,bbb\n"


@pytest.fixture
def users(tmp_path) -> Path:
    folder = tmp_path / "users"
    folder.mkdir()
    for name in ("zoe.csv", "René.csv", "bob.csv"):
        (folder / name).write_text(GOOD, encoding="utf8")
    (folder / "carl.jsonl").write_text('{"prompt": "c=", "completion": "ccc"}\n')
    (folder / "README.md").write_text("# users")
    return folder


@pytest.fixture
def broken(users) -> Path:
    (users / "bad.csv").write_text('prompt,completion\n"a=,aaa\n')
    (users / "empty.csv").write_text("")
    return users


def lines(out: str) -> dict[str, list[str]]:
    """Cells of each line of a table by the first one."""
    return {cells[0]: cells[1:] for cells in (line.split("\t") for line in out.splitlines()[1:])}


@pytest.mark.filterwarnings("ignore")
def test_a_folder_becomes_a_store_in_one_command(cli, folder, broken, tmp_path, caplog):
    store = tmp_path / "store"
    with caplog.at_level(logging.WARNING):
        code, out, err = cli("train", folder, broken, "--store", store, *FAST)
    assert code == 3
    assert list(lines(out)) == ["René", "bob", "carl", "zoe"]
    assert {cells[0] for cells in lines(out).values()} == {"trained"}
    assert "trained 4 prefixes in " in err
    assert ", 2 failed" in err
    assert [line.split(":")[0] for line in err.splitlines()[-2:]] == ["bad failed", "empty failed"]
    assert "README.md" in caplog.text
    assert sorted(PrefixStore(store)) == ["René", "bob", "carl", "zoe"]
    assert not [p for p in store.rglob("*.safetensors") if "checkpoint" in p.parts]
    (run,) = run_folders(store)
    assert {json.loads(line)["prefix"] for line in (run / "failed.jsonl").read_text().splitlines()} == {"bad", "empty"}

    (broken / "bad.csv").write_text(GOOD)
    (broken / "bob.csv").write_text(GOOD.replace("a=", "x="))
    (broken / "empty.csv").unlink()
    (broken / "dora.csv").write_text(GOOD)
    code, out, err = cli("train", folder, broken, "--store", store, *FAST, "--resume")
    assert code == 0, err
    kinds = {name: cells[0] for name, cells in lines(out).items()}
    assert kinds == dict.fromkeys(("bad", "bob", "dora"), "trained") | dict.fromkeys(
        ("René", "carl", "zoe"), "unchanged"
    )
    assert {n: len(PrefixStore(store).versions(n)) for n in kinds} == dict.fromkeys(kinds, 1) | {"bob": 2}

    rows = tmp_path / "requests.jsonl"
    rows.write_text(json.dumps({"prompt": "a=", "prefix": "René"}) + "\n")
    how = ("--details", "--store", store, "--max-new-tokens", 2)
    code, _, err = cli("generate", rows, "-o", tmp_path / "out.jsonl", *how)
    assert code == 0, err
    made = json.loads((tmp_path / "out.jsonl").read_text())
    assert made["prefix_digest"] == PrefixStore(store)["René"].digest

    code, out, _ = cli("prefixes", "rm", store, "bob", "--yes")
    assert (code, "bob" in PrefixStore(store)) == (0, False)
    assert "bob: deleted 2 versions" in out
    assert "not searched" in out


def test_one_file_is_named_by_its_stem_where_the_store_alone_gets_it(cli, folder, users, tmp_path):
    for words in ([users / "zoe.csv"], [f"ann={users / 'zoe.csv'}"], [users / "z*.csv"]):
        assert cli("train", folder, *words, "--store", tmp_path / "s", *FAST)[0] == 0
    assert sorted(PrefixStore(tmp_path / "s")) == ["ann", "zoe"]
    assert cli("train", folder, users / "zoe.csv", "--store", tmp_path / "t", "-o", tmp_path / "o", *FAST)[0] == 0
    assert list(PrefixStore(tmp_path / "t")) == ["prefix"]
    assert Prefix.from_pretrained(tmp_path / "o").length == 3


def test_held_out_rows_by_stem(cli, folder, users, tmp_path):
    code, out, err = cli("train", folder, users, "--eval-data", users, "-o", tmp_path / "o", *FAST)
    assert code == 0, err
    assert "eval_loss" in out.splitlines()[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "eve.csv").write_text(GOOD)
    code, _, err = cli("train", folder, users, "--eval-data", tmp_path / "other", "-o", tmp_path / "p", *FAST)
    assert (code, "'eve'" in err) == (1, True)


def test_neither_a_folder_nor_a_store(cli, folder, users):
    code, _, err = cli("train", folder, users, *FAST)
    assert code == 2
    assert "--store" in err
    assert cli("train", folder, users / "zoe.csv", *FAST, "--dry-run")[0] == 0


def test_words_of_data(users):
    assert isinstance(named_files([str(users)]), Folder)
    assert isinstance(named_files([f"{users}/*.csv"]), Folder)
    one = str(users / "zoe.csv")
    assert named_files([one]) == one
    assert dict(named_files([one], by_stem=True)) == {"zoe": users / "zoe.csv"}
    assert dict(named_files([f"a={one}", f"b={one}"])) == {"a": users / "zoe.csv", "b": users / "zoe.csv"}
    mixed = named_files([f"ann={one}", str(users / "bob.csv"), f"{users}/c*"])
    assert dict(mixed) == {"ann": users / "zoe.csv", "bob": users / "bob.csv", "carl": users / "carl.jsonl"}
    assert named_files(["nowhere.csv"]) == "nowhere.csv"
    equals = users / "x=y.csv"
    equals.write_text(GOOD)
    assert named_files([str(equals)]) == str(equals)
    assert named_files([f"{users}/[x]=*"])["x=y"] == equals


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("{u}/zoe.csv", "{u}/nowhere.csv"), ConfigError),
        (("{u}/zoe.csv", "zoe={u}/bob.csv"), DataError),
        (("a={u}/zoe.csv", "a={u}/bob.csv"), DataError),
        (("{u}/*.parquet",), DataError),
        (("{u}/*.parquet", "{u}/zoe.csv"), DataError),
        (("{u}", "{u}/zoe.csv"), None),
    ],
)
def test_wrong_words_of_data(users, words, error):
    given = [w.format(u=users) for w in words]
    if error is None:
        assert sorted(named_files(given)) == ["René", "bob", "carl", "zoe"]
        return
    with pytest.raises(error):
        named_files(given)


@pytest.mark.parametrize("command", ["generate", "score"])
@pytest.mark.parametrize("given", ["", "*.csv"], ids=["folder", "pattern"])
def test_a_folder_of_requests_is_refused_before_any_work(cli, users, tmp_path, command, given):
    code, _, err = cli(command, users / given, "-o", tmp_path / "out.jsonl", "--model", "nowhere")
    assert code == 1
    assert "'prefix'" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_check_of_a_folder(cli, broken):
    code, out, err = cli("data", "check", "auto", broken)
    assert code == 1
    assert lines(out)["René"] == ["prompt", "2", "2", "0"]
    assert lines(out)["empty"][3] == "1"
    assert "6 files, " in err
    assert "problems in 2 files" in err
    assert f"{broken / 'bad.csv'}:2" in err
    found = json.loads(cli("data", "check", "auto", broken, "--json").out)
    assert (sorted(found["files"]), list(found["left_out"])) == (
        ["René", "bad", "bob", "carl", "empty", "zoe"],
        ["README.md"],
    )
    assert cli("data", "check", "prompt", f"{broken}/[zR]*").code == 0


def interrupt_when_logged(store: Path, pid: int) -> None:
    """Ctrl-C once the log of the run has a line."""
    while not any((run / "log.jsonl").exists() and (run / "log.jsonl").read_text() for run in run_folders(store)):
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)


def test_an_interrupted_run_goes_on_from_the_store(cli, folder, users, tmp_path):
    store, run = tmp_path / "s", ("train", folder, users, *FAST, "--max-steps", 60, "--logging-steps", 1)
    run += ("--reparameterization", "none")
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    thread = threading.Thread(target=interrupt_when_logged, args=(store, os.getpid()))
    thread.start()
    try:
        code, _, err = cli(*run, "--store", store)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, old)
    assert code == 130
    assert f"--resume goes on from the checkpoint in {store}" in err
    (state,) = store.rglob("state.json")
    assert 0 < json.loads(state.read_text())["state"]["step"] < 60
    assert cli(*run, "--store", store, "--resume")[0] == 0
    assert cli(*run, "--store", tmp_path / "whole")[0] == 0
    digests = [{n: kept[n].digest for n in kept} for kept in (PrefixStore(store), PrefixStore(tmp_path / "whole"))]
    assert digests[0] == digests[1]


def test_receipts_name_what_goes_on(tmp_path):
    receipt = {"name": "a\nb", "digests": (), "files": 1, "bytes": 10, "checkpoints": 2, "running": ("run-1",)}
    text = "\n".join(receipt_lines([receipt], tmp_path))
    assert "0 versions, 1 file, 10 B" in text
    assert "2 checkpoints" in text
    assert "run-1" in text
    assert "a\\nb" in text
    assert receipt_lines([], tmp_path) == []
