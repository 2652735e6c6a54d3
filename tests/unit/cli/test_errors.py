"""Errors of the command line: the known flag for a name of another library, files that cannot be read, markup."""

from __future__ import annotations

import json
import os

import pytest


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    return path


@pytest.mark.parametrize(
    ("flag", "known"),
    [("--stop", "--stop-strings"), ("--n", "--num-return-sequences"), ("--max-tokens", "--max-new-tokens")],
)
def test_a_flag_of_another_library_suggests_the_known_one(cli, folder, rows, tmp_path, flag, known):
    made = cli("generate", rows, "-o", tmp_path / "o.jsonl", "--model", folder, flag, "1")
    assert made.code == 2
    assert known in made.err


def test_words_of_training_are_known_too(cli, folder, rows, tmp_path):
    made = cli("train", folder, rows, "-o", tmp_path / "o", "--num-virtual-tokens", "1")
    assert (made.code, "--prefix-length" in made.err) == (2, True)


@pytest.mark.parametrize("option", ["--temperature=1e39", "--num-beams=99999999999999999999", "--seed=-1"])
def test_a_number_out_of_range_is_named_before_the_base_is_loaded(cli, rows, tmp_path, option):
    made = cli("generate", rows, "-o", tmp_path / "o.jsonl", "--model", tmp_path / "no-base", "--do-sample", option)
    assert made.code in (1, 2)
    assert option.partition("=")[0][2:].replace("-", "_") in made.err.replace("-", "_")
    assert "no-base" not in made.err
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere"), lambda p: None])
def test_a_config_file_that_cannot_be_read_is_named(cli, folder, rows, tmp_path, make):
    path = tmp_path / "[red]c.yaml"
    make(path)
    for command in (("generate", rows, "--model", folder, "--config"), ("train", folder, rows, "--config")):
        made = cli(*command, path, "-o", tmp_path / "out.jsonl")
        assert made.code == 1
        assert f"{path}: cannot be read" in made.err


@pytest.mark.parametrize(
    "content", ["n: 2", "max_tokens: 3", f"seed: {'9' * 5000}", "[" * 5000, "- 1", "temperature: .inf"]
)
def test_a_config_file_with_wrong_content_is_named(cli, rows, tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    made = cli("generate", rows, "-o", tmp_path / "o.jsonl", "--model", tmp_path / "no-base", "--config", path)
    assert made.code == 1
    assert "--config" in made.err or "temperature" in made.err


def test_markup_in_a_name_is_printed(cli, tmp_path):
    made = cli("prefixes", "show", tmp_path, "[red]x[/red]")
    assert made.code == 1
    assert "[red]x[/red]" in made.err
