"""What a step costs beside the model: planning, tables, slot table, plan objects (forward and selection are replaced by constants).

Run with ``python -m pytest benches/system --benchmark-only``; the same with 20 and with 2,000 resident prefixes, a tenth of the rows replaced in each step.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefixfast import Engine, Prefix
from prefixfast.config import GenerationParams
from prefixfast.engine.request import make_requests
from prefixfast.engine.search import Choice, Greedy

ROWS, LENGTH, LAYERS = 32, 16, 2


class Constant(Greedy):
    """Chooses token 5 for ever."""

    def step(self, logits, at):
        self.limits.count[at] += 1
        return Choice(torch.full_like(at, 5), None, None)


@pytest.fixture
def running(request, monkeypatch):
    """An engine with all rows decoding and this many resident prefixes; returns what makes and ends requests."""
    resident = request.param
    monkeypatch.setattr("prefixfast.engine.prefix_cache.KEPT_PREFIXES", 10_000)
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
        call = GenerationParams(max_new_tokens=900)
        made = iter(range(10**9))

        def add() -> None:
            i = next(made)
            (r,) = make_requests(engine.model, [[3] * 40], [prefixes[i % resident]], call, engine.max_model_len)
            engine.loop.add(i, r)

        with torch.inference_mode():
            # each prefix is used once, so that all are resident
            engine.generate([[3]] * resident, prefixes, max_new_tokens=1, progress=False)
            engine.loop.rows.greedy = Constant(ROWS + 1, engine.loop.rows.eos)
            logits = torch.zeros(ROWS, 128)
            engine.model.forward = lambda plan, ids: logits[: len(ids if plan.logits_at is None else plan.logits_at)]
            yield engine.loop, add, resident


@pytest.mark.parametrize("running", [20], indirect=True)
def test_a_decode_step_of_32_rows(running, benchmark):
    loop, add, _ = running
    for _ in range(ROWS):
        add()
    while loop.scheduler.num_waiting:
        loop.step()
    benchmark.pedantic(loop.step, rounds=400, warmup_rounds=20)
    assert loop.counts["decode_steps"] > 400


@pytest.mark.parametrize("running", [20, 2000], indirect=True)
def test_a_step_with_a_tenth_replaced(running, benchmark):
    loop, add, _ = running
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
