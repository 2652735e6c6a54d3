"""`Model`: closing, memory, `repr`, and the method of version 0.1.0."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tiny
from prefixfast import BaseMismatchError, load

IDS = torch.arange(3, 20)[None]


def test_closing_twice_leaves_another_user_attached():
    model = tiny.make("gpt2")
    first, second = load(model), load(model)
    first.close()
    first.close()
    with pytest.raises(RuntimeError, match="attached to prefixfast"):
        model(input_ids=IDS)
    second.close()
    assert model(input_ids=IDS).logits.isfinite().all()


def test_a_model_without_references_is_freed():
    gone = weakref.ref(load(tiny.make("gpt2")).hf)
    gc.collect()
    assert gone() is None


def test_the_repr_is_one_line(base, folder):
    assert repr(base) == (
        f"Model(GPT2LMHeadModel, name={str(folder)!r}, dtype=float32, device='cpu', layers=3, backend='torch')"
    )
    with load(tiny.make("llama"), backend="reference") as unnamed:
        assert repr(unnamed) == (
            "Model(LlamaForCausalLM, name='', dtype=float32, device='cpu', layers=3, backend='reference')"
        )


def test_check_prefix_of_version_0_1_0_warns_and_checks(base, make_prefix):
    with pytest.warns(FutureWarning, match="use prefixfast.check_fits"):
        base.check_prefix(make_prefix())
    with load(tiny.make("llama")) as other, pytest.warns(FutureWarning), pytest.raises(BaseMismatchError):
        other.check_prefix(make_prefix())
