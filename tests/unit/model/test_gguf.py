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

PROMPT = list(range(3, 20))


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of query and key weights in llama.cpp's order, which interleaves the two halves that RoPE rotates."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model, tokenizer, *, quantized: bool = False) -> None:
    c = model.config
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    tokens = tokenizer.convert_ids_to_tokens(list(range(c.vocab_size)))
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(c.vocab_size)])
    w.add_token_scores([0.0] * c.vocab_size)  # no merges, since the tokens have none that transformers could derive
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = paired(weight, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        data, kind = weight.numpy().astype(np.float32), gguf.GGMLQuantizationType.Q8_0
        if quantized and data.ndim == 2 and data.shape[1] % 32 == 0:
            w.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(data, kind), raw_dtype=kind
            )
        else:
            w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny llama.gguf"
    write(path, tiny.make("llama"), tokenizer)
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
    write(tmp_path / "x.gguf", tiny.make("llama"), tokenizer, quantized=True)
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
