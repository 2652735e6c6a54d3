"""Time of the parts of a decode step of 32 rows with the sizes of GPT-2 124M.

Run with ``python -m pytest benches/system --benchmark-only``.
"""

import numpy as np
import pytest
import torch

from prefixfast import _rust
from prefixfast.attention import cpu_decode, ops
from prefixfast.config import GenerationParams
from prefixfast.engine.search import BeamSearch, GreedySearch
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.testing.tables import Request, decode_tables

ROWS, HEADS, DIM, VOCAB, KEYS = 32, 12, 64, 50257, 55


@pytest.mark.parametrize("distinct", [0, 1, 32])
def test_attention_of_one_layer(benchmark, distinct):
    length = 200 if distinct else 0
    first = distinct * length
    k, v = torch.randn(2, first + 4096, HEADS, DIM)
    table = (torch.randperm(4096)[: ROWS * KEYS] + first).view(ROWS, -1).int()
    requests = [Request(0, ((i % distinct, True),) if distinct else ()) for i in range(ROWS)]
    tables = decode_tables([KEYS] * ROWS, requests, [(i * length, length) for i in range(distinct)])
    inputs = DecodeInputs(torch.randn(ROWS, HEADS, DIM), k, v, table)
    benchmark(cpu_decode.decode, inputs, tables, AttnOptions(DIM**-0.5))


def test_new_keys_of_one_layer(benchmark):
    k, v = torch.zeros(2, 4096, HEADS, DIM)
    new, slots = torch.randn(ROWS, HEADS, DIM), torch.randperm(4096)[:ROWS].int()
    benchmark(ops.kv_write, k, v, new, new, slots)


@pytest.mark.parametrize("beams", [1, 4])
def test_choosing(benchmark, beams):
    logits, eos = torch.randn(ROWS, VOCAB), torch.tensor([50256])
    chooser = GreedySearch(ROWS + 1, eos) if beams == 1 else BeamSearch(beams, ROWS + 1, 1 << 12, eos)
    at = torch.arange(0, ROWS, beams)

    def start() -> None:
        for row in at.tolist():
            chooser.start(row, GenerationParams(max_new_tokens=1000, min_new_tokens=0, num_beams=beams))

    benchmark.pedantic(lambda: chooser.step(logits.clone(), at), setup=start, rounds=50)


def test_planning(benchmark):
    scheduler = _rust.Scheduler(80 + ROWS * 2048, ROWS, 4096)
    for i in range(ROWS):
        scheduler.add(i, [], 40, 1, 1900)
    out = np.zeros(1 << 20, np.int32)

    def step() -> None:
        scheduler.plan_step(out)
        scheduler.commit([])

    benchmark.pedantic(step, rounds=500, warmup_rounds=10)
