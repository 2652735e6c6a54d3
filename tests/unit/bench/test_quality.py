"""Suites ``users`` and ``quality`` on a tiny base and a few rows of E2E's form: results, agreement, missing data."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prefixfast.bench import users
from prefixfast.bench.quality import peft_run, prefixfast_run, settings
from prefixfast.bench.quality.settings import Setting, authors_row, plain_row
from prefixfast.errors import ConfigError

ROWS = [
    {"mr": f"name[{name}], food[{food}]", "ref": f"{name} has {food}."}
    for name in ("A", "B", "C")
    for food in ("rice", "pie", "tea", "figs", "plums", "bread")
]
RESULT = ["impl", "setting", "dtype", "threads", "losses", "train_seconds"]


@pytest.fixture
def data(tmp_path) -> Path:
    """E2E in three forms: official CSV, gzip JSON lines, and rows without references."""
    folder = tmp_path / "e2e"
    folder.mkdir()
    with (folder / "trainset.csv").open("w", encoding="utf8", newline="") as f:
        writer = csv.DictWriter(f, ("mr", "ref"))
        writer.writeheader()
        writer.writerows(ROWS)
    with gzip.open(folder / "e2e_dev.jsonl.gz", "wt", encoding="utf8") as f:
        f.writelines(json.dumps(row) + "\n" for row in ROWS[:4])
    (folder / "e2e_test_mr_only.jsonl").write_text("".join(json.dumps({"mr": r["mr"]}) + "\n" for r in ROWS[:12]))
    return folder


@pytest.fixture
def setting(monkeypatch) -> None:
    monkeypatch.setitem(settings.SETTINGS, "smollm2-text", Setting("none", 5e-2, 3, 2, plain_row, init_text="tell :"))
    for module in (peft_run, prefixfast_run):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 4)


def quality(cli, base: Path, data: Path, output: Path, *more: object) -> dict:
    done = cli("bench", "quality", "smollm2-text", base, data, "-o", output, "--threads", 1, *more)
    assert done.code == 0, done.err
    assert "bleu" in done.out or more[-2:-1] == ("--steps",)
    return json.loads((output / "results.json").read_text(encoding="utf8"))


def test_prefixfast_and_peft_train_alike(cli, folder, data, tmp_path, setting):
    texts = data / "e2e_test_mr_only.jsonl"
    ours = quality(cli, folder, data, tmp_path / "ours", "--texts", texts)
    theirs = quality(cli, folder, data, tmp_path / "theirs", "--impl", "peft")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-3)
    assert list(theirs) == [*RESULT, "dev_loss", "bleu", "texts", "cpu", "flags"]
    assert list(ours) == [*RESULT, "dev_loss", "bleu", "generate_seconds", "texts", "more_texts", "cpu", "flags"]
    assert list(ours["more_texts"]) == [r["mr"] for r in ROWS[:12]]
    for output in ("ours", "theirs"):
        assert (tmp_path / output / "prefix" / "adapter_config.json").exists()


def test_a_few_steps_are_not_evaluated(cli, folder, data, tmp_path, setting):
    """The norms and the number of threads of a run in fp64 do not outlive it."""
    before = LlamaRMSNorm.forward, torch.get_num_threads()
    found = quality(cli, folder, data, tmp_path / "out", "--dtype", "float64", "--steps", 2)
    assert list(found) == [*RESULT, "cpu", "flags"]
    theirs = quality(cli, folder, data, tmp_path / "theirs", "--impl", "peft", "--dtype", "float64", "--steps", 2)
    assert len(found["losses"]) == 2
    assert found["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert (LlamaRMSNorm.forward, torch.get_num_threads()) == before


def test_the_base_alone(cli, folder, data, tmp_path, setting):
    found = quality(cli, folder, data, tmp_path / "out", "--impl", "none")
    assert found["impl"] == "none"
    assert "losses" not in found
    assert found["dev_loss"] > 0


def test_users(cli, folder, data, tmp_path, monkeypatch):
    for name, value in {"USERS": 3, "REQUESTS": 12, "NEW": 3, "COMPARED": range(0, 12, 4)}.items():
        monkeypatch.setattr(users, name, value)
    done = cli("bench", "users", folder, data, "-o", tmp_path / "out", "--steps", 1)
    assert done.code == 0, done.err
    first, head, row = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert first["environment"]["cpu"]
    assert head == {"suite": "e2e_users", "base": folder.name}
    assert (row["users"], row["requests"], row["different"]) == (3, 12, [])
    assert row["compared"] == {"requests": 3, "tokens": 9}
    assert row["texts"][0]["mr"] == ROWS[0]["mr"]
    assert (row["dtype"], row["largest_gap"]) == ("float32", 0.0)
    assert "computing in float32 on cpu" in done.err


def test_users_with_other_tokens_have_no_speed(cli, folder, data, tmp_path, monkeypatch):
    for name, value in {"USERS": 3, "REQUESTS": 12, "NEW": 3, "COMPARED": range(0, 12, 4)}.items():
        monkeypatch.setattr(users, name, value)
    right = users.mixed_by_hand
    monkeypatch.setattr(users, "mixed_by_hand", lambda *a: lambda: [[(t + 1) % 50 for t in own] for own in right(*a)()])
    done = cli("bench", "users", folder, data, "-o", tmp_path / "out", "--steps", 1)
    assert done.code == 1
    assert "users: transformers: token " in done.err
    assert "tokens/s" not in done.out
    assert not (tmp_path / "out").exists()


def test_without_sacrebleu_nothing_is_trained(cli, folder, data, tmp_path, monkeypatch):
    for name in ("sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    done = cli("bench", "quality", "smollm2-text", folder, data, "-o", tmp_path / "out")
    assert done.code == 1
    assert "pip install 'prefixfast[eval]'" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suite", [("users",), ("quality", "smollm2-text")], ids=lambda words: words[0])
def test_missing_data_is_one_message(cli, folder, tmp_path, suite):
    done = cli("bench", *suite, folder, tmp_path, "-o", tmp_path / "out")
    assert done.code == 1
    assert f"E2E: expected a file of train rows in {str(tmp_path)!r}" in done.err
    assert not (tmp_path / "out").exists()


def test_rows_without_a_key_are_refused(data):
    (data / "trainset.csv").write_text("mr,text\na,b\n")
    with pytest.raises(ConfigError, match="expected rows with the keys mr, ref, got none with ref"):
        settings.SETTINGS["nlg-10m"].batches(data)


def test_an_unknown_setting_is_refused(cli, folder, data):
    done = cli("bench", "quality", "large", folder, data)
    assert done.code == 2
    assert "expected one of smollm2-text, smollm2-mlp, nlg-10m" in done.err


def test_the_paper_s_strings():
    class Tokenizer:
        eos_token = "<end>"

    row = {"mr": "name[A], eatType[pub], priceRange[£20-25]", "ref": "A is a pub."}
    expected = {"prompt": " name : A | Type : pub | price : £ 20 - 25 <end>", "completion": " A is a pub. "}
    assert authors_row(Tokenizer())(row) == expected
