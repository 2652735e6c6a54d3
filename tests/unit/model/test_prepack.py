"""Packed weights: the same results, and a model that is restored."""

import pytest
import torch

import prefixfast
import tiny
from prefixfast import Engine
from prefixfast.model.prepack import prepack

pytestmark = pytest.mark.skipif(
    prepack(torch.nn.Linear(8, 8)).why_not is not None, reason=f"packing: {prepack(torch.nn.Linear(8, 8)).why_not}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_results_are_the_same_and_undo_restores_the_model(family, dtype):
    base = tiny.make(family).to(dtype)
    before, forwards = (
        {k: v.clone() for k, v in base.state_dict().items()},
        [m.__dict__.get("forward") for m in base.modules()],
    )
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = base(ids).logits
        packed = prepack(base)
        assert packed.why_not is None
        assert packed.nbytes > 0
        packed.begin()
        got = base(ids).logits
        packed.end()
    assert torch.equal(
        torch.stack([v.float().sum() for v in before.values()]),
        torch.stack([v.float().sum() for v in base.state_dict().values()]),
    )
    assert (got - expected).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype] * expected.abs().max()
    packed.undo()
    assert [m.__dict__.get("forward") for m in base.modules()] == forwards
    with torch.inference_mode():
        assert torch.equal(base(ids).logits, expected)


def test_packed_products_are_used_in_runs_without_gradients_only(monkeypatch):
    base = tiny.make("gpt2")
    packed = prepack(base)
    calls = []
    original = prefixfast.model.prepack._linear
    monkeypatch.setattr(prefixfast.model.prepack, "_linear", lambda *args: (calls.append(1), original(*args))[1])
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        base(ids)
    assert not calls, "outside of a run nothing compares the weights with their copies"
    packed.begin()
    base(ids)
    assert not calls, "with gradients the module's own forward runs"
    with torch.no_grad():
        base(ids)
        assert len(calls) == 13  # 4 per layer and the head
        calls.clear()
        base.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
        changed = base(ids).logits
        assert len(calls) == 12, "a changed weight is not read from its copy"
    packed.undo()
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, changed)


def test_an_engine_packs_the_weights_and_restores_the_model():
    base = tiny.make("llama")
    with Engine(base, max_num_seqs=2, max_model_len=32) as engine:
        assert engine.model.packed is not None
        got = engine.generate([[5, 6, 7]], max_new_tokens=8)[0].token_ids
        assert "forward" in base.lm_head.__dict__
    assert "forward" not in base.lm_head.__dict__
    with Engine(base, max_num_seqs=2, max_model_len=32, prepack=False) as engine:
        assert "forward" not in base.lm_head.__dict__
        assert engine.generate([[5, 6, 7]], max_new_tokens=8)[0].token_ids == got


@pytest.mark.parametrize("change", ["dtype", "forward", "no layers"])
def test_unsupported_weights_are_not_packed_and_the_reason_is_returned(change):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    if change == "dtype":
        model.double()
    elif change == "forward":
        model[0].forward = lambda x: x
    else:
        model = torch.nn.ReLU()
    packed = prepack(model)
    assert packed.why_not is not None
    assert packed.nbytes == 0


def test_copies_larger_than_the_free_memory_are_not_made(monkeypatch):
    monkeypatch.setattr(prefixfast.model.prepack, "free_memory", lambda _: 1000)
    base = tiny.make("gpt2")
    with Engine(base, max_num_seqs=2, max_model_len=32) as engine:
        assert "more than half of the free 0 MiB" in engine.explain()["linear"]
        assert not any("forward" in m.__dict__ for m in base.modules())
        assert len(engine.generate([[5, 6, 7]], max_new_tokens=4, min_new_tokens=4)[0].token_ids) == 4
