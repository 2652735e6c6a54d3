"""`Folder`: names of files, what is left out, and refusals."""

from __future__ import annotations

import gzip
import logging
import os
import unicodedata
from pathlib import Path

import pytest

import prefixfast
from prefixfast import ConfigError, DataError, Folder
from prefixfast.data import read_rows

ROW = "prompt,completion\na,b\n"


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(ROW)
    return folder


def test_names_are_stems_in_sorted_order(tmp_path):
    make(tmp_path, "zoe.csv", "ann.v2.csv", "bob smith.CSV", "Émile.csv", "李雷.csv", "10.csv", "9.csv")
    (tmp_path / "carl.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n'))
    found = Folder(tmp_path)
    assert list(found) == sorted(["zoe", "ann.v2", "bob smith", "Émile", "李雷", "10", "9", "carl"])
    assert read_rows(found["carl"]) == [{"prompt": "a", "completion": "b"}]
    assert (len(found), found.skipped, "ann" in found, found["9"]) == (8, {}, False, tmp_path / "9.csv")


def test_what_is_left_out_is_named(tmp_path, caplog):
    make(tmp_path, "ann.csv", ".DS_Store", ".ann.csv.swp", "README.md", "bob.xlsx", "data.csv.bak", "noending")
    (tmp_path / "old.csv").mkdir()
    with caplog.at_level(logging.WARNING):
        found = Folder(tmp_path)
    assert list(found) == ["ann"]
    assert set(found.skipped) == {
        ".DS_Store",
        ".ann.csv.swp",
        "README.md",
        "bob.xlsx",
        "data.csv.bak",
        "noending",
        "old.csv",
    }
    assert [all(name in r.getMessage() for name in found.skipped) for r in caplog.records] == [True]
    assert ".csv" in found.skipped["bob.xlsx"]


def test_a_clean_folder_logs_nothing(tmp_path, caplog):
    Folder(make(tmp_path, "ann.csv"))
    assert not caplog.records


@pytest.mark.parametrize("pair", [("ann.csv", "ann.jsonl"), ("ann.csv", "ann.csv.gz"), ("ann.jsonl", "ann.JSON")])
def test_two_files_of_one_name_are_refused(tmp_path, pair):
    make(tmp_path, *pair)
    with pytest.raises(DataError) as e:
        Folder(tmp_path)
    assert all(str(tmp_path / name) in str(e.value) for name in pair)


def test_names_are_as_a_keyboard_writes_them(tmp_path):
    decomposed = unicodedata.normalize("NFD", "René")
    make(tmp_path, f"{decomposed}.csv")
    assert list(Folder(tmp_path)) == ["René"]
    make(tmp_path, "René.csv")
    if len(list(tmp_path.iterdir())) == 2:  # a file system that tells them apart
        with pytest.raises(DataError, match="one name"):
            Folder(tmp_path)


def test_patterns(tmp_path):
    make(tmp_path, "ann.csv", "bob.csv", "bob.jsonl", "notes.md")
    make(tmp_path / "more", "eve.csv")
    assert list(Folder(tmp_path / "*.csv")) == ["ann", "bob"]
    assert list(Folder(f"{tmp_path}/**/*.csv")) == ["ann", "bob", "eve"]
    assert Folder(tmp_path / "[an]*").skipped == {"notes.md": "no file of rows"}
    with pytest.raises(DataError, match="no file matches"):
        Folder(tmp_path / "*.parquet")
    with pytest.raises(DataError, match="one name"):
        Folder(tmp_path / "b*")


def test_a_folder_whose_name_has_the_characters_of_a_pattern(tmp_path):
    assert list(Folder(make(tmp_path / "users[1]*", "ann.csv"))) == ["ann"]


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("missing", DataError, "no such folder"),
        ("empty", DataError, "got none"),
        ("notes", DataError, r"left out: a.md"),
        ("ann.csv", DataError, "got a file"),
        ("", ConfigError, "folder: expected a path"),
        ("a\0b", ConfigError, "folder: expected a path"),
        (3, ConfigError, "folder: expected a path"),
    ],
)
def test_wrong_folders(tmp_path, monkeypatch, path, error, match):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "ann.csv")
    make(tmp_path / "empty")
    make(tmp_path / "notes", "a.md")
    with pytest.raises(error, match=match):
        Folder(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder(tmp_path):
    folder = make(tmp_path / "users", "ann.csv")
    folder.chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read"):
            Folder(folder)
    finally:
        folder.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16")
def test_a_name_that_is_no_text_is_left_out(tmp_path):
    make(tmp_path, "ann.csv")
    try:
        (tmp_path / os.fsdecode(b"b\xff.csv")).write_text(ROW)
    except OSError:
        pytest.skip("the file system takes no such name")
    found = Folder(tmp_path)
    assert list(found) == ["ann"]
    assert list(found.skipped.values()) == ["its name is not UTF-8"]


@pytest.mark.parametrize("given", ["", "*.csv"], ids=["folder", "pattern"])
def test_a_folder_in_place_of_a_file_is_refused_with_advice(tmp_path, given):
    make(tmp_path, "ann.csv")
    with pytest.raises(DataError, match=r"Folder\(path\)"):
        prefixfast.train("no model is loaded", tmp_path / given)


def test_a_file_that_vanishes_or_is_unreadable_fails_alone(tmp_path):
    from prefixfast.training.inputs import ReadOptions, read_training_rows

    make(tmp_path, "ann.csv", "bob.csv", "eve.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere")
    found = Folder(tmp_path)
    (tmp_path / "bob.csv").unlink()
    rows = read_training_rows(found, None, ReadOptions())
    assert (list(rows.rows), sorted(rows.failed), rows.is_single) == (["ann", "eve"], ["bob", "link"], False)
