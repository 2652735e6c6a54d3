"""The base model that calls by name share, and models in memory that are restored at the end of a call."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import tiny
from prefixfast import CapacityError, Engine, RequestError, generate, load, unload
from prefixfast.model import load as loading
from prefixfast.model import shared_base
from prefixfast.model.shared_base import borrowed

IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def _empty_cache():
    unload()
    yield
    unload()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


# ---- models in memory ----


def test_borrowed_restores_a_model():
    model = tiny.make("llama").train()
    before = logits(model)
    with borrowed(model) as base:
        assert not model.training
        assert base.hf is model
    assert model.training
    assert torch.equal(logits(model), before)


def test_borrowed_restores_a_model_after_an_error():
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
def test_generate_restores_a_model(batch):
    model = tiny.make("gpt2").train()
    before = logits(model)
    try:
        generate(batch, model=model, max_new_tokens=2, max_num_seqs=2)
    except RequestError:
        assert batch != [[3, 4]]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), before)


def test_an_engine_that_fails_to_start_restores_the_model():
    model = tiny.make("gpt2")
    before = logits(model)
    with pytest.raises(CapacityError):
        Engine(model, kv_cache_memory=1)
    assert torch.equal(logits(model), before)


# ---- the cached base of calls by name ----


def test_a_name_is_loaded_once(folder):
    with borrowed(folder) as first, borrowed(str(folder)) as second:
        assert first is second
    with borrowed(folder) as third:
        assert third is first


def test_unload_frees_the_cached_base(folder):
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


def test_another_name_replaces_the_cached_base(folder, tmp_path, tokenizer):
    tiny.make("gpt2", seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with borrowed(folder) as first:
        mark = first.fingerprint["weights"]
    with borrowed(tmp_path) as second:
        assert second.fingerprint["weights"] != mark
    assert len(shared_base._CACHE) == 1


def test_an_error_while_loading_leaves_no_cached_base(folder, monkeypatch):
    monkeypatch.setattr(loading, "attach", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), borrowed(folder):
        pass
    assert shared_base._CACHE == []
