"""``train --init FOLDER``: prefixes of prefixfast and of PEFT are continued, with the options that they decide."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import PrefixTuningConfig, get_peft_model

import tiny
from prefixfast import Prefix
from prefixfast.training.defaults import default_learning_rate

FAST = ("--max-steps", 1, "--batch-size", 2, "--dtype", "float32")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}=", "completion": a * 3}) + "\n" for a in "abcd"))
    return path


@pytest.fixture
def adapter(tmp_path):
    """A folder that PEFT wrote."""
    torch.manual_seed(0)
    path = tmp_path / "adapter"
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(tiny.make("gpt2"), config).save_pretrained(path)
    return path


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_folder_is_continued(cli, folder, data, adapter, tmp_path, frozen):
    if frozen:  # PEFT's CARTRIDGE, whose first rows stay as they are
        made = cli("train", folder, data, "-o", adapter, "--init", adapter, "--frozen-rows", 1, *FAST, "--overwrite")
        assert made.code == 0, made.err
        assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "CARTRIDGE"
    start = Prefix.from_pretrained(adapter)
    rate = default_learning_rate(start, len(start.layers), uses_mlp=False)
    done = cli("train", folder, data, "-o", tmp_path / "p", "--init", adapter, *FAST)
    assert done.code == 0, done.err
    prefix = Prefix.from_pretrained(tmp_path / "p")
    assert (prefix.length, prefix.training["config"]["learning_rate"]) == (5, rate)
    for name, values in prefix.kv.items():
        change = (values - start.kv[name]).abs()
        assert change.max() <= 1.001 * rate  # the first step of Adam changes a number by the rate at most
        assert frozen == 0 or bool((change[:frozen] == 0).all())
    assert any((values != start.kv[name]).any() for name, values in prefix.kv.items())
    shown = cli("train", folder, data, "-o", tmp_path / "q", "--init", adapter, *FAST, "--print-config")
    printed = yaml.safe_load(shown.out)
    assert (printed["prefix_length"], printed["learning_rate"], printed["frozen_rows"]) == (5, None, frozen)
    (tmp_path / "run.yaml").write_text(shown.out)
    again = cli("train", folder, data, "-o", tmp_path / "r", "--init", adapter, "--config", tmp_path / "run.yaml")
    assert again.code == 0, again.err
    assert Prefix.from_pretrained(tmp_path / "r").digest == prefix.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prefix-length", 10), "prefix_length: the prefix in init has 5, got 10; leave it out"),
        (("--pos-start", "zero"), "pos_start: the prefix in init has 'after', got 'zero'; leave it out"),
        (("--init-text", "tell"), "init_text: expected only with init='text', got a prefix as init"),
        (("--sweep", "prefix_length=5,6"), "prefix_length: the prefix in init has 5, got 6; leave it out"),
    ],
)
def test_options_that_the_prefix_decides(cli, folder, data, adapter, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("prefixfast.training.trainer.load_base", lambda *_: pytest.fail("the base is loaded"))
    refused = cli("train", folder, data, "-o", tmp_path / "p", "--init", adapter, *FAST, *arguments)
    assert refused.code == 1
    assert message in refused.err
    same = ("--prefix-length", 5, "--print-config")
    assert cli("train", folder, data, "-o", tmp_path / "p", "--init", adapter, *FAST, *same).code == 0
