"""The packed forward, the engine and a training step on a CUDA device against the CPU (`make gpu`).

Forwards and decode steps must also be capturable in a CUDA graph.
"""

import numpy as np
import pytest
import torch

import prefixfast
import tiny
from parity.packed import case, packed
from prefixfast.attention.plan import plain_plan
from prefixfast.config import GenerationParams
from prefixfast.engine.make_requests import make_requests
from prefixfast.training.trainer import train

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _require_cuda():
    if not CUDA:
        pytest.fail("make gpu needs a CUDA device; none was found")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_packed_logits_equal_the_cpu(family):
    c = case(lambda: tiny.make(family), vocab=tiny.VOCAB, longest=3 * tiny.WINDOW)
    out = []
    for device in ("cpu", "cuda"):
        with prefixfast.load(tiny.make(family).to(device)) as base, torch.no_grad():
            moved = type(c)([p.to(device) for p in c.prompts], c.choice, [t.to(device) for t in c.tables])
            out.append(packed(base, moved, moved.prefixes(base.hf))[0].cpu())
    assert (out[0] - out[1]).abs().max() < 1e-4 * out[0].abs().max()


def prefixes_and_prompts():
    layers = {1: (0, 1, 2), 2: (0, 2)}  # the second prefix leaves a layer out
    prefixes = [
        prefixfast.Prefix({f"self.{i}.{x}": torch.full((4, 2, 8), 0.1 * j) for i in layers[j] for x in "kv"}, 4)
        for j in layers
    ]
    prompts = [np.random.default_rng(i).integers(3, tiny.VOCAB, 5 + i).tolist() for i in range(6)]
    return prompts, [prefixes[i % 2] for i in range(6)]


@pytest.mark.parametrize("beams", [1, 4])
def test_tokens_equal_the_cpu(beams):
    out = []
    for device in ("cpu", "cuda"):
        with prefixfast.Engine(tiny.make("llama").to(device), max_num_seqs=32, max_model_len=48) as engine:
            rows = [
                {"input_ids": p, "params": {"max_new_tokens": 4 + 3 * i}}
                for i, p in enumerate(prefixes_and_prompts()[0])
            ]
            out.append([g.token_ids for g in engine.generate(rows, prefixes_and_prompts()[1], num_beams=beams)])
            if device == "cuda":
                made = engine.loop.runner.graphs.steps
                assert len(made) > 1, "several numbers of rows"
                assert all(static.graph is not None for static in made.values()), "captured"
    assert out[0] == out[1]


def test_a_decode_step_does_not_wait_for_the_device():
    """Only tokens are read, by an event, which torch's synchronization check does not count."""
    prompts, prefixes = prefixes_and_prompts()
    with (
        prefixfast.Engine(tiny.make("llama").cuda(), max_num_seqs=8, max_model_len=64) as engine,
        torch.inference_mode(),
    ):
        call = GenerationParams(max_new_tokens=40, min_new_tokens=40)
        for request in make_requests(engine.model, prompts, prefixes, call, engine.max_model_len):
            engine.loop.add(next(engine.driver.next_number), request)
        while engine.loop.counts["decode_steps"] < 3:
            engine.loop.step()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(20):
                engine.loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        while engine.loop.busy:
            engine.loop.step()


def test_training_equals_the_cpu():
    rows = [{"input_ids": [5 + i, 6, 7, 8], "labels": [-100, -100, 7, 8]} for i in range(8)]
    losses = [
        train(tiny.make("llama").to(d), rows, init="random", prefix_length=4, max_steps=5).training["metrics"]["loss"]
        for d in ("cpu", "cuda")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_attached_forward_is_captured(family):
    """A packed forward does not synchronize with the host: one captured graph is replayed on other tokens."""
    with prefixfast.load(tiny.make(family).cuda(), backend="triton") as base, torch.no_grad():
        plan = plain_plan([9, 20], backend=base.backend, device="cuda")
        ids = torch.arange(3, 32, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                base.forward(plan, ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = base.forward(plan, ids)
        other = torch.arange(40, 69, device="cuda")
        ids.copy_(other)
        graph.replay()
        assert torch.equal(out, base.forward(plan, other))
