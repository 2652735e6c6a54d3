"""Logits, gradients and tokens of whole models agree between backends. On a CPU, triton runs in its interpreter."""

import pytest
import torch

import prefixfast
import tiny
from parity.packed import case, packed
from prefixfast import Engine, Prefix
from prefixfast.attention import backends
from prefixfast.prefix import peft_format as layout
from prefixfast.training.trainer import train


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(f, marks=pytest.mark.long) for f in ("llama", "gemma3")), "gemma2"]
)
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
    runs = []
    for backend in ("torch", "triton"):
        with prefixfast.load(tiny.make("llama"), backend=backend) as base:
            runs.append(
                train(
                    base,
                    {"a": rows, "b": rows[::-1]},
                    init="random",
                    reparameterization="none",
                    prefix_length=4,
                    max_steps=3,
                    batch_size=2,
                )
            )
    for name in ("a", "b"):
        for key, t in runs[0][name].kv.items():
            assert (t - runs[1][name].kv[key]).abs().max() < 1e-5 * t.abs().max()


NO_COSTS = {"part_bytes": 0, "item_bytes": 0, "launch_bytes": 0}


@pytest.mark.parametrize(
    ("family", "costs"), [("gpt2", {}), ("gemma2", NO_COSTS)], ids=["gpt2, no groups", "gemma2, groups"]
)
def test_generation_on_triton_equals_torch(family, costs, monkeypatch):
    """Beam search on one prefix and on a sequence of two prefixes."""
    pytest.importorskip("triton")
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist() for n in (7, 1, 4)]
    decode_sizes = backends.decode_sizes
    monkeypatch.setattr(backends, "decode_sizes", lambda *shapes: decode_sizes(*shapes)._replace(**costs))
    runs = []
    for backend in ("torch", "triton"):
        base = tiny.make(family)
        a, b = (Prefix(layout.from_table(tiny.peft_table(base, n, n), *tiny.shapes(base)), pos_start=n) for n in (5, 9))
        with prefixfast.load(base, backend=backend) as model, Engine(model, max_num_seqs=6, max_model_len=32) as engine:
            runs.append(
                [r.token_ids for r in engine.generate(prompts, [a, [a, b], None], num_beams=2, max_new_tokens=3)]
            )
    assert runs[0] == runs[1]
