"""`load`: options, dtype, models in memory, LoRA layers, and models that are restored after errors."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

import prefixfast
import tiny
from prefixfast import ConfigError, _rust, load
from prefixfast.model import load as loading

IDS = torch.arange(3, 20)[None]


WRONG = {
    "dtype: unknown": {"dtype": "int8"},
    "dtype: name with torch": {"dtype": "torch.float32"},
    "dtype: None": {"dtype": None},
    "dtype: a number": {"dtype": 3},
    "dtype: integers": {"dtype": torch.int32},
    "dtype: half on a CPU": {"dtype": "float16", "device": "cpu"},
    "device: unknown": {"device": "gpu"},
    "backend: unknown": {"backend": "flash"},
    "tokenizer: a folder's name": {"tokenizer": "some/folder"},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused(folder, options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}"):
        load(folder, **{"dtype": "float32", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_device_is_refused(folder):
    with pytest.raises(ConfigError, match="device"):
        load(folder, device="cuda")


@pytest.mark.parametrize(
    "make", [lambda: 5, lambda: None, lambda: torch.nn.Linear(2, 2)], ids=["number", "None", "module"]
)
def test_other_objects_are_refused(make):
    with pytest.raises(
        ConfigError, match="model: expected a hub id, a folder, a transformers model or a prefixfast Model, got"
    ):
        load(make())


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_follows_the_processor(folder, monkeypatch, fast, expected):
    monkeypatch.setattr(loading, "has_fast_bf16", lambda: fast)
    with load(folder, device="cpu") as base:
        assert base.dtype == expected


def test_bfloat16_is_fast_with_amx_and_on_amd():
    path = Path("/proc/cpuinfo")
    if not path.exists():
        pytest.skip("no /proc/cpuinfo")
    words = path.read_text(encoding="utf8").split()
    is_fast_avx512 = "avx512_bf16" in words and "GenuineIntel" not in words
    assert (_rust.attend_paths()[0] == "avx512_bf16") == is_fast_avx512
    assert loading.has_fast_bf16() == (is_fast_avx512 or "amx_tile" in words)


def test_slow_bfloat16_is_a_warning(folder, monkeypatch, caplog):
    monkeypatch.setattr(loading, "has_fast_bf16", lambda: False)
    with caplog.at_level(logging.WARNING, "prefixfast"), load(folder, dtype="bfloat16", device="cpu") as base:
        assert base.dtype == torch.bfloat16
    assert "bfloat16 without AMX" in caplog.text


def test_load_returns_a_loaded_model_unchanged(base):
    assert load(base) is base


def test_load_reads_model_and_tokenizer_of_a_folder(base, tokenizer):
    assert (base.vocab_size, base.max_positions, base.dtype, len(base.layers)) == (tiny.VOCAB, 160, torch.float32, 3)
    assert base.require_tokenizer().eos == tokenizer.eos_token


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_by_name(backend):
    with load(tiny.make("gpt2"), backend=backend) as base:
        assert base.backend.name == backend


def test_a_wrong_tokenizer_leaves_the_model_restored():
    model = tiny.make("gpt2")
    before = model(input_ids=IDS).logits
    with pytest.raises(ConfigError, match="tokenizer: expected a tokenizer of transformers"):
        load(model, tokenizer=object())
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_lora_layers_are_part_of_the_base():
    plain = tiny.make("llama")
    torch.manual_seed(1)
    peft = get_peft_model(
        tiny.make("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    ids = torch.tensor([[5, 6, 7]])
    how = {"max_new_tokens": 8, "min_new_tokens": 8}
    expected = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **how)[0, 3:].tolist()
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    with load(peft) as base, load(plain) as other:
        got, without = (
            prefixfast.generate([[5, 6, 7]], model=m, progress=False, **how)[0].token_ids for m in (base, other)
        )
        assert got == expected != without
        assert base.fingerprint["weights"] != other.fingerprint["weights"]
    assert {n for n, p in peft.named_parameters() if p.requires_grad} == trained


def test_a_peft_model_with_virtual_tokens_is_refused():
    peft = get_peft_model(tiny.make("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match=r"from_pretrained"):
        load(peft)
