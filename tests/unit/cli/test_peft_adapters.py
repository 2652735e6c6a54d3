"""Every command that reads a prefix reads a PROMPT_TUNING adapter with its base, or asks for the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from prefixfast import Prefix, PrefixStore, generate
from virtual import adapter

EXACT = ("--dtype", "float32")


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory) -> Path:
    """Folder of an adapter that names its base, and of one that does not."""
    path = tmp_path_factory.mktemp("adapters")
    adapter(AutoModelForCausalLM.from_pretrained(folder), path / "named")
    adapter(AutoModelForCausalLM.from_pretrained(folder), path / "nameless", "P_TUNING MLP")
    config = path / "nameless" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf8").replace(f'"{folder}"', "null"), encoding="utf8")
    return path


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a=", "completion": "aaa"}\n', encoding="utf8")
    return path


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf8").splitlines()[0])


@pytest.fixture
def digest(adapters, base):
    return {name: Prefix.from_pretrained(adapters / name, model=base).digest for name in ("named", "nameless")}


@pytest.mark.parametrize("command", ["generate", "score"])
def test_generate_and_score(cli, adapters, folder, rows, digest, tmp_path, command):
    out = tmp_path / "out.jsonl"
    done = cli(
        command, rows, "-o", out, "--details", "--prefix", adapters / "named", *EXACT
    )  # the base that the adapter names
    assert done.code == 0, done.err
    assert read(out)["prefix_digest"] == digest["named"]
    asked = cli(command, rows, "-o", tmp_path / "none.jsonl", "--prefix", adapters / "nameless", *EXACT)
    assert asked.code == 1
    assert "--model" in asked.err
    how = ("--details", "--prefix", adapters / "nameless", "--model", folder)
    done = cli(command, rows, "-o", out, *how, *EXACT)
    assert done.code == 0, done.err
    assert read(out)["prefix_digest"] == digest["nameless"]


def test_training_starts_from_an_adapter(cli, adapters, folder, rows, tmp_path, base):
    how = ("--max-steps", "1", "--batch-size", "1", "--learning-rate", "1e-9", *EXACT)
    done = cli("train", folder, rows, "-o", tmp_path / "p", "--init", adapters / "nameless", *how)
    assert done.code == 0, done.err
    trained, start = Prefix.from_pretrained(tmp_path / "p"), Prefix.from_pretrained(adapters / "nameless", model=base)
    assert trained.length == start.length
    assert all((trained.kv[name] - t).abs().max() < 1e-5 for name, t in start.kv.items())


def test_convert(cli, adapters, folder, tmp_path):
    asked = cli("convert", adapters / "named", tmp_path / "p")
    assert asked.code == 1
    assert f"'{folder}'" in asked.err  # the base that the adapter names
    done = cli("convert", adapters, tmp_path / "all", "--recursive", "--verify", "--model", folder)
    assert done.code == 0, done.err
    for name in ("named", "nameless"):
        config = json.loads((tmp_path / "all" / name / "adapter_config.json").read_text(encoding="utf8"))
        assert config["peft_type"] == "PREFIX_TUNING"
        assert Prefix.from_pretrained(tmp_path / "all" / name).training["imported_from"] == "peft"
    wrong = cli("convert", adapters, tmp_path / "none", "--recursive", "--model", tmp_path / "nowhere")
    assert wrong.code == 3
    assert wrong.out.count("nowhere") == 2


def test_a_store(cli, adapters, folder, tmp_path):
    store = tmp_path / "s"
    assert "--model" in cli("prefixes", "add", store, "ann", adapters / "nameless").err
    assert cli("prefixes", "add", store, "ann", adapters / "nameless", "--model", folder).code == 0
    asked = cli("prefixes", "import", store, adapters)
    assert (asked.code, asked.out.count("--model")) == (3, 2)
    assert cli("prefixes", "import", store, adapters, "--model", folder).code == 0
    assert sorted(PrefixStore(store)) == ["ann", "named", "nameless"]
    assert PrefixStore(store).info("named").base["name"] == str(folder)


def test_try(cli, adapters, folder, base):
    done = cli("try", folder, "a=", "--prefix", adapters / "nameless", "--max-new-tokens", 2, "--json", *EXACT)
    assert done.code == 0, done.err
    prefix = Prefix.from_pretrained(adapters / "nameless", model=base)
    expected = [generate(["a="], p, model=base, max_new_tokens=2)[0].text for p in (None, prefix)]
    assert [record["text"] for record in json.loads(done.out)] == expected
