"""Time of an engine step without the model: planning, tables, slot table and plan objects.

Constants replace the forward pass and the choice of tokens. A step with a tenth of the rows replaced is measured with
20 and with 2,000 resident prefixes. Run with ``python -m pytest benches/system --benchmark-only``.
"""

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefixfast import Engine, Prefix
from prefixfast.bench.engine_loop import add_requests
from prefixfast.config import GenerationParams
from prefixfast.engine.search import Choice, GreedySearch

ROWS, LENGTH, LAYERS = 32, 16, 2


class Constant(GreedySearch):
    """Search that chooses token 5 in every step."""

    def step(self, logits, at):
        self.limits.count[at] += 1
        return Choice(torch.full_like(at, 5), None, None)


@pytest.fixture
def running(request, monkeypatch):
    """Loop of an engine with ``request.param`` resident prefixes, and a function that adds a request to the loop."""
    resident = request.param
    monkeypatch.setattr("prefixfast.engine.prefix_cache.MAX_PREFIXES", 10_000)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_embd=64, n_head=1, vocab_size=128, n_positions=1024)).eval()
    base.generation_config.eos_token_id = None
    prefixes = [
        Prefix({f"self.{i}.{x}": torch.randn(LENGTH, 1, 64) for i in range(LAYERS) for x in "kv"}, pos_start=0)
        for _ in range(resident)
    ]
    with Engine(
        base,
        max_num_seqs=ROWS,
        max_model_len=1000,
        kv_cache_memory=(80 + ROWS * 1024 + resident * LENGTH) * 4 * 64 * 2 * LAYERS,
    ) as engine:
        params = GenerationParams(max_new_tokens=900)
        made = itertools.count()

        def add() -> None:
            add_requests(engine, [[3] * 40], [prefixes[next(made) % resident]], params)

        with torch.inference_mode():
            # One request of each prefix makes all prefixes resident.
            engine.generate([[3]] * resident, prefixes, max_new_tokens=1, progress=False)
            engine.loop.batch.greedy = Constant(ROWS + 1, engine.loop.batch.end_tensor)
            logits = torch.zeros(ROWS, 128)
            engine.model.forward = lambda plan, ids: logits[: len(ids if plan.logits_at is None else plan.logits_at)]
            yield engine.loop, add


@pytest.mark.parametrize("running", [20], indirect=True)
def test_a_decode_step_of_32_rows(running, benchmark):
    loop, add = running
    for _ in range(ROWS):
        add()
    while loop.scheduler.num_waiting:
        loop.step()
    benchmark.pedantic(loop.step, rounds=400, warmup_rounds=20)
    assert loop.counts["decode_steps"] > 400


@pytest.mark.parametrize("running", [20, 2000], indirect=True)
def test_a_step_with_a_tenth_replaced(running, benchmark):
    loop, add = running
    for _ in range(ROWS):
        add()
    while loop.scheduler.num_waiting:
        loop.step()
    before = loop.counts["loads"]

    def step() -> None:
        for number in list(loop.requests)[:3]:
            loop.cancel(number)
            add()
        loop.step()

    benchmark.pedantic(step, rounds=200, warmup_rounds=20)
    assert loop.counts["loads"] == before, "all are resident"
