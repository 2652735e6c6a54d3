"""A `.gguf` file as a base model: a tiny Llama in a file of gguf's writer, against the same model in transformers."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import tiny
from composed import error, logits
from prefixfast import ConfigError, Prefix, generate, load
from quantized import write_gguf

PROMPT = list(range(3, 20))


@pytest.fixture(scope="module")
def file(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny llama.gguf"
    write_gguf(path, tiny.make("llama"), tokenizer)
    return path


@pytest.fixture(scope="module")
def gguf_base(file):
    with load(file, dtype="float32") as base:
        yield base


def test_logits_are_those_of_the_model_itself(gguf_base):
    with torch.no_grad():
        expected = tiny.make("llama")(input_ids=torch.tensor([PROMPT])).logits[0]
    assert error(logits(gguf_base, PROMPT), expected) < 1e-5


def test_the_tokenizer_of_the_file_is_loaded(gguf_base, tokenizer):
    text = "The Mill: £5!"
    assert gguf_base.require_tokenizer().encode([text], add_special_tokens=False)[0].tolist() == tokenizer.encode(
        text, add_special_tokens=False
    )
    assert gguf_base.require_tokenizer().eos_id == 2


def test_a_prefix_finds_its_gguf_base(gguf_base, file, tmp_path):
    prefix = Prefix.from_text(gguf_base, PROMPT)
    prefix.save_pretrained(tmp_path / "p")
    again = Prefix.from_pretrained(tmp_path / "p")
    assert again.requires["base"] == str(file)
    with load(again.requires["base"], dtype="float32") as second:
        assert second.fingerprint == gguf_base.fingerprint
        (with_prefix,), (alone,) = (
            generate(batch, p, model=second, max_new_tokens=5)
            for batch, p in (([[7, 8]], again), ([[*PROMPT, 7, 8]], None))
        )
        assert with_prefix.token_ids == alone.token_ids


def test_the_fingerprint_is_that_of_a_folder_with_the_same_weights(gguf_base, tmp_path):
    tiny.make("llama").save_pretrained(tmp_path)
    with load(tmp_path, dtype="float32", tokenizer=gguf_base.require_tokenizer().hf) as other:
        assert other.fingerprint["weights"] == gguf_base.fingerprint["weights"]
        assert other.fingerprint["config"] == gguf_base.fingerprint["config"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_dequantized_to_the_compute_dtype(file, dtype):
    with load(file, dtype=dtype) as base:
        assert {p.dtype for p in base.hf.parameters()} == {getattr(torch, dtype)} == {base.dtype}


def test_a_quantized_file_becomes_an_ordinary_model(tmp_path, tokenizer, caplog):
    write_gguf(tmp_path / "x.gguf", tiny.make("llama"), tokenizer, quantized=True)
    with torch.no_grad():
        exact = tiny.make("llama")(input_ids=torch.tensor([PROMPT])).logits[0]
    with caplog.at_level(logging.WARNING), load(tmp_path / "x.gguf", dtype="float32") as base:
        got = logits(base, PROMPT)
        assert "Dequantizing" not in caplog.text  # dequantization was asked for, not a fallback
        assert getattr(base.hf.config, "quantization_config", None) is None
        assert {p.dtype for p in base.hf.parameters()} == {torch.float32}
        prefix = Prefix.from_text(base, PROMPT)
        assert error(logits(base, [7, 8], [prefix]), logits(base, [*PROMPT, 7, 8])[len(PROMPT) :]) < 1e-5
    assert 1e-4 < error(got, exact) < 0.05  # error of 8-bit weights


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_package_is_named(file, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(ConfigError, match=rf"needs {missing}: pip install 'prefixfast\[gguf\]'"):
        load(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder or file"):
        load(tmp_path / "x.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 4096], ids=["empty", "cut", "garbage"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path / "x.gguf")


def test_a_truncated_file_is_refused(file, tmp_path):
    data = file.read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path / "x.gguf")


def test_an_encoder_decoder_file_is_refused_with_the_reason(tmp_path):
    w = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "t5")
    w.add_context_length(64)
    w.add_block_count(1)
    w.add_embedding_length(16)
    w.add_feed_forward_length(16)
    w.add_head_count(2)
    w.add_key_length(8)
    w.add_relative_attn_buckets_count(8)
    w.add_decoder_start_token_id(0)
    w.add_vocab_size(32)
    w.add_tensor("token_embd.weight", np.zeros((32, 16), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(ConfigError, match="it is an encoder-decoder model, which is loaded from a folder of transform"):
        load(tmp_path / "x.gguf")
