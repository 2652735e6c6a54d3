"""Every backend gives the same logits, gradients and tokens through whole models; the triton kernels run in their interpreter here."""

import pytest

import prefixfast
import tiny
from parity.packed import case, packed
from prefixfast.training.trainer import train


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3"])
def test_triton_equals_torch_through_a_model(family):
    pytest.importorskip("triton")
    c = case(lambda: tiny.make(family), vocab=tiny.VOCAB, longest=2 * tiny.WINDOW)
    runs = []
    for backend in ("torch", "triton"):
        with prefixfast.load(tiny.make(family), backend=backend) as base:
            logits, leaves = packed(base, c, c.prefixes(base.hf), grad=True)
            logits.logsumexp(-1).sum().backward()
            runs.append([logits.detach(), *(t.grad for kv in leaves for t in kv)])
    assert all((a - b).abs().max() < 1e-5 * b.abs().max() for a, b in zip(*runs, strict=True))


def test_training_on_triton_equals_torch():
    pytest.importorskip("triton")
    rows = [{"input_ids": [5 + i, 6, 7, 8], "labels": [-100, -100, 7, 8]} for i in range(6)]
    ends = []
    for backend in ("torch", "triton"):
        with prefixfast.load(tiny.make("llama"), backend=backend) as base:
            ends.append(train(base, {"a": rows, "b": rows[::-1]}, init="random", reparameterization="none", prefix_length=4, max_steps=3, batch_size=2))
    for name in ("a", "b"):
        for key, t in ends[0][name].kv.items():
            assert (t - ends[1][name].kv[key]).abs().max() < 1e-5 * t.abs().max()
