"""What `load` cannot load ends in one ConfigError with the true reason and what to do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import tiny
from prefixfast import ConfigError, load
from prefixfast.model import base_name, tokenizer
from prefixfast.model import load as load_module

QUANTIZED = {  # library that is missing, and its entry of the config
    "optimum": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "gptqmodel": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "optimum-quanto": {"quant_method": "quanto", "weights": "int8"},
    "aqlm": {"quant_method": "aqlm"},
}


@pytest.fixture
def plain(tmp_path) -> Path:
    """Folder of a model without a tokenizer."""
    tiny.make("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("library", QUANTIZED)
def test_quantized_weights_without_their_library_name_it(plain, library):
    if importlib.util.find_spec(library.replace("-", "_")) is not None:
        pytest.skip(f"{library} is installed")
    path = plain / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": QUANTIZED[library]}))
    with pytest.raises(ConfigError, match=rf"cannot be loaded: .*pip install .*{library}"):
        load(plain, dtype="float32")


def test_a_name_that_the_hub_does_not_answer_for_is_no_folder_either(plain, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(load_module, "is_seq2seq_base", unreachable)
    monkeypatch.setattr(base_name, "_is_offline", lambda: False)
    with pytest.raises(ConfigError, match=r"no network; there is no folder 'no-such-folder' here$"):
        load("no-such-folder")
    with pytest.raises(ConfigError, match=r"no network$"):
        load(plain)


def test_a_folder_without_a_tokenizer_says_so(plain):
    with pytest.raises(ConfigError, match="the folder has no tokenizer; save one there"):
        load(plain, dtype="float32")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "T5Tokenizer", "GPTSw3Tokenizer"])
def test_a_tokenizer_that_must_be_converted_names_the_missing_libraries(plain, monkeypatch, kind):
    monkeypatch.setattr(tokenizer, "_is_installed", lambda name: name == "google.protobuf")
    for name in ("tokenizer.model", "spiece.model"):
        (plain / name).write_bytes(b"\n\x0d\n\x03abc\x15\x00\x00\x80\xbf")
    (plain / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    if importlib.util.find_spec("sentencepiece") is not None:
        pytest.skip("sentencepiece is installed")
    with pytest.raises(ConfigError, match="pip install sentencepiece tiktoken "):
        load(plain, dtype="float32")


def test_a_model_in_memory_with_an_unreadable_tokenizer_is_loaded_without(plain, caplog):
    (plain / "tokenizer.model").write_bytes(b"\n\x0d\n\x03abc\x15\x00\x00\x80\xbf")
    (plain / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with load(transformers.AutoModelForCausalLM.from_pretrained(plain)) as base:
        assert base.tokenizer is None
    assert "prompts must be token ids" in caplog.text


def offloaded_to_the_cpu(_: Path) -> Any:
    return accelerate.cpu_offload(tiny.make("llama"), execution_device=torch.device("cpu"))


def offloaded_to_disk(folder: Path) -> Any:
    return accelerate.disk_offload(tiny.make("llama"), folder / "offloaded", execution_device=torch.device("cpu"))


def one_layer_on_disk(folder: Path) -> Any:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder / "offloaded"
    )


@pytest.mark.parametrize("make", [offloaded_to_the_cpu, offloaded_to_disk, one_layer_on_disk])
def test_offloaded_weights_are_refused(plain, make):
    model = make(plain)
    with pytest.raises(ConfigError, match="some of its weights are offloaded; load it without device_map"):
        load(model)
    with torch.no_grad():
        assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.GROUPED))
    with pytest.raises(ConfigError, match="meta device, without values"):
        load(model)


def test_a_device_map_with_one_device_works(plain):
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, device_map="cpu")
    with load(model) as base:
        assert base.device.type == "cpu"
