"""`load`, the base that calls by name share, models that come back as they were, and fingerprints."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

import prefixfast
import tiny
from oracles import ROOT
from prefixfast import CapacityError, ConfigError, Engine, RequestError, generate, load, unload
from prefixfast.model import load as loading
from prefixfast.model import shared_base
from prefixfast.model.fingerprint import fingerprint
from prefixfast.model.shared_base import borrowed

IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def _no_kept_base():
    unload()
    yield
    unload()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


WRONG = {
    "dtype: unknown": {"dtype": "int8"},
    "dtype: torch name": {"dtype": "torch.float32"},
    "dtype: none": {"dtype": None},
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
def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ConfigError, match="device"):
        load(folder, device="cuda")


@pytest.mark.parametrize(
    "make", [lambda: 5, lambda: None, lambda: torch.nn.Linear(2, 2)], ids=["number", "None", "module"]
)
def test_something_that_is_no_model_is_refused(make):
    with pytest.raises(
        ConfigError, match="model: expected a hub id, a folder, a transformers model or a prefixfast Model, got"
    ):
        load(make())


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_follows_the_processor(folder, monkeypatch, fast, expected):
    monkeypatch.setattr(loading, "has_fast_bf16", lambda: fast)
    with load(folder, device="cpu") as base:
        assert base.dtype == expected


def test_slow_bfloat16_is_given_with_a_warning(folder, monkeypatch, caplog):
    monkeypatch.setattr(loading, "has_fast_bf16", lambda: False)
    with caplog.at_level(logging.WARNING, "prefixfast"), load(folder, dtype="bfloat16", device="cpu") as base:
        assert base.dtype == torch.bfloat16
    assert "bfloat16 without AVX512-BF16 or AMX" in caplog.text


def test_load_takes_what_it_returned(base):
    assert load(base) is base


def test_load_gives_what_is_in_the_folder(base, tokenizer):
    assert (base.vocab_size, base.max_positions, base.dtype, len(base.layers)) == (tiny.VOCAB, 160, torch.float32, 3)
    assert base.require_tokenizer().eos == tokenizer.eos_token


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_are_taken_by_name(backend):
    with load(tiny.make("gpt2"), backend=backend) as base:
        assert base.backend.name == backend


# ---- objects come back as they were ----


def test_borrowed_gives_an_object_back(caplog):
    model = tiny.make("llama").train()
    before = logits(model)
    with borrowed(model) as base:
        assert not model.training
        assert base.hf is model
    assert model.training
    assert torch.equal(logits(model), before)


def test_borrowed_gives_an_object_back_after_an_error():
    model = tiny.make("llama").train()
    before = logits(model)
    with pytest.raises(KeyboardInterrupt), borrowed(model):
        raise KeyboardInterrupt
    assert model.training
    assert torch.equal(logits(model), before)


def test_borrowed_leaves_a_loaded_model_attached():
    with load(tiny.make("llama")) as base:
        with borrowed(base) as same:
            assert same is base
        with pytest.raises(RuntimeError, match="attached to prefixfast"):
            logits(base.hf)


@pytest.mark.parametrize("batch", [[[3, 4]], [[tiny.VOCAB]]], ids=["good", "refused"])
def test_generate_gives_an_object_back(batch):
    model = tiny.make("gpt2").train()
    before = logits(model)
    try:
        generate(batch, model=model, max_new_tokens=2, max_num_seqs=2)
    except RequestError:
        assert batch != [[3, 4]]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), before)


def test_an_engine_that_cannot_be_made_gives_the_model_back():
    model = tiny.make("gpt2")
    before = logits(model)
    with pytest.raises(CapacityError):
        Engine(model, kv_cache_memory=1)
    assert torch.equal(logits(model), before)


def test_a_wrong_tokenizer_gives_the_model_back():
    model = tiny.make("gpt2")
    before = logits(model)
    with pytest.raises(ConfigError, match="tokenizer: expected a fast tokenizer"):
        load(model, tokenizer=object())
    assert torch.equal(logits(model), before)


def test_closing_twice_takes_nothing_from_another_user():
    model = tiny.make("gpt2")
    first, second = load(model), load(model)
    first.close()
    first.close()
    with pytest.raises(RuntimeError, match="attached to prefixfast"):
        logits(model)
    second.close()
    assert logits(model).isfinite().all()


def test_a_loaded_model_that_nobody_holds_is_freed():
    gone = weakref.ref(load(tiny.make("gpt2")).hf)
    gc.collect()
    assert gone() is None


# ---- the base of calls by name ----


def test_a_name_is_loaded_once(folder):
    with borrowed(folder) as first, borrowed(str(folder)) as second:
        assert first is second
    with borrowed(folder) as third:
        assert third is first


def test_unload_drops_the_kept_base(folder):
    with borrowed(folder) as first:
        pass
    gone = weakref.ref(first.hf)
    del first
    unload()
    gc.collect()
    assert gone() is None


def test_unload_without_a_base_does_nothing():
    unload()
    unload()


def test_another_name_replaces_the_kept_base(folder, tmp_path, tokenizer):
    tiny.make("gpt2", seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with borrowed(folder) as first:
        mark = first.fingerprint["weights"]
    with borrowed(tmp_path) as second:
        assert second.fingerprint["weights"] != mark
    assert len(shared_base._CACHE) == 1


def test_an_error_while_loading_leaves_no_kept_base(folder, monkeypatch):
    monkeypatch.setattr(loading, "attach", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), borrowed(folder):
        pass
    assert shared_base._CACHE == []


# ---- fingerprints ----


def weights(**how: Any) -> str:
    with load(tiny.make("gpt2", **how)) as base:
        return base.fingerprint["weights"]


def test_a_fingerprint_is_quick(base):
    times = []
    for _ in range(7):
        start = time.perf_counter()
        fingerprint(base.hf, base.require_tokenizer().digest_text)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_a_fingerprint_is_json(base):
    assert json.loads(json.dumps(base.fingerprint)) == base.fingerprint


def test_a_fingerprint_is_that_of_the_weights_in_any_dtype(folder, base):
    with load(folder, dtype="bfloat16") as other:
        assert {k: other.fingerprint[k] for k in ("config", "weights", "tokenizer")} == {
            k: base.fingerprint[k] for k in ("config", "weights", "tokenizer")
        }


def test_a_fingerprint_does_not_depend_on_the_attachment(base):
    assert fingerprint(tiny.make("gpt2"), None)["weights"] == base.fingerprint["weights"]


def test_other_weights_have_another_fingerprint():
    assert weights(seed=1) != weights(seed=0) == weights(seed=0)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.2.mlp.c_proj.weight",
        "transformer.ln_f.bias",
    ],
)
def test_a_fine_tuned_part_changes_the_fingerprint(name):
    model = tiny.make("gpt2")
    before = fingerprint(model, None)["weights"]
    with torch.no_grad():
        model.get_parameter(name).mul_(1.05)
    assert fingerprint(model, None)["weights"] != before


def test_another_architecture_has_another_configuration(base):
    with load(tiny.make("llama")) as other:
        assert other.fingerprint["config"] != base.fingerprint["config"]


# ---- the package ----

IMPORT = "import time, sys; t = time.perf_counter(); import prefixfast; print(time.perf_counter() - t, *({'torch', 'transformers', 'numpy'} & set(sys.modules)))"


def test_the_package_imports_fast_and_without_torch():
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    runs = [
        subprocess.run(
            [sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert [r[1:] for r in runs] == [[]] * 3
    assert min(float(r[0]) for r in runs) < 0.3


def test_the_package_has_its_names_and_no_others():
    assert all(getattr(prefixfast, name) is not None for name in prefixfast.__all__)
    assert set(prefixfast.__all__) <= set(dir(prefixfast))
    with pytest.raises(AttributeError, match="module 'prefixfast' has no attribute 'tune'"):
        prefixfast.tune  # noqa: B018


def test_a_model_with_lora_inside_is_a_base_of_its_own():
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


def test_virtual_tokens_beside_a_model_are_refused():
    peft = get_peft_model(tiny.make("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match=r"from_pretrained"):
        load(peft)
