"""The examples run offline on the base that the package contains, and print correct results."""

from __future__ import annotations

import csv
import json
import re
import runpy
import sys

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from oracles import ROOT
from prefixfast import Prefix, PrefixStore
from prefixfast.demo.jobs import JOBS

EXAMPLES = ROOT / "examples"
SCRIPTS = ("from_peft", "many_users", "own_columns", "research", "serve")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Function that runs an example as a script in an empty folder, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_a_file_with_columns_of_its_own_becomes_texts_beside_new_rows(run, tmp_path):
    printed = run("own_columns").splitlines()
    before, after = map(float, re.findall(r"\d\.\d\d", printed[0]))
    assert after < before / 2
    with (tmp_path / "own-columns" / "texts.csv").open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == printed[1:]
    assert sum(JOBS[0].has_form(row["text"]) for row in rows) >= 4
    assert sum(row["Name"] in row["text"] for row in rows) >= 4
    assert set(rows[0]) == {"Name", "Town", "Cook", "Near", "Description", "text"}


def test_many_users_are_trained_found_by_name_and_deleted(run, tmp_path):
    printed = run("many_users").splitlines()
    assert printed[:5] == [
        "trained: ann, bob, eva, jon, lena, tom",
        "failed: zoe",
        "eva: Best wishes, Eva",
        "bob: See you on Friday, Bob",
        "ann: With love, Ann",
    ]
    assert printed[5].startswith("deleted: bob")
    assert printed[5].endswith("hold it still: 0")
    assert sorted(PrefixStore(tmp_path / "many-users" / "store")) == ["ann", "eva", "jon", "lena", "tom"]


def test_a_sweep_is_compared_on_held_out_rows(run, tmp_path):
    *lines, best, again = run("research").splitlines()
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(losses) == 4
    assert losses == sorted(losses)
    assert best.startswith("best: 16 prefix rows")
    assert float(again.rsplit(" ", 1)[1]) == pytest.approx(losses[0], abs=2e-3)
    assert (tmp_path / "research" / "losses.png").stat().st_size > 1000
    assert "learning_rate=0.2" in (tmp_path / "research" / "report.md").read_text(encoding="utf8")


def test_requests_of_many_clients_are_served_with_their_own_prefixes(run):
    printed = run("serve")
    cooks = {"norvale": "Lumira", "tarnfield": "Melina", "brimwick": "Tashana"}
    for number, name in enumerate([*cooks, *cooks]):
        assert f"client {number}, {name}: Have you tried what {cooks[name]}" in printed
    assert re.search(r"streamed in [2-5] pieces: Have you tried what Lumira", printed)
    assert "urgent: Have you tried what Tashana" in printed
    assert "3 prefixes loaded" in printed


def test_adapters_of_peft_are_served_trained_further_and_exported(run, folder, tmp_path):
    printed = run("from_peft")
    assert "PEFT agrees on all 4 adapters" in printed
    for seed in range(2):
        torch.manual_seed(seed)
        plain, config = AutoModelForCausalLM.from_pretrained(folder), PrefixTuningConfig(task_type="CAUSAL_LM")
        config.num_virtual_tokens = 6
        get_peft_model(plain, config).save_pretrained(tmp_path / "own" / f"a{seed}")
    rows = [{"prompt": f"{a} and {b}: ", "completion": "yes sir"} for a in "abc" for b in "xyz"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    printed = run("from_peft", folder, tmp_path / "own", tmp_path / "rows.jsonl", tmp_path / "new")
    assert "PEFT agrees on all 3 adapters" in printed
    before, after = (float(part.split()[0]) for part in printed.rsplit("first target: ", 1)[1].split(" before, "))
    assert after > before + 1
    assert PeftConfig.from_pretrained(tmp_path / "new").num_virtual_tokens == 6
    assert Prefix.from_pretrained(tmp_path / "new").digest != Prefix.from_pretrained(tmp_path / "own" / "a0").digest


def test_every_example_is_tested_and_listed():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    listed = (EXAMPLES / "README.md").read_text(encoding="utf8")
    assert {p.name for p in EXAMPLES.iterdir()} - {"README.md"} == set(re.findall(r"^\* \[(\S+)\]\(\1\)", listed, re.M))
