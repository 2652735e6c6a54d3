"""Composed prefixes on the backends of a CPU: the numbers of the prefixes do not affect a bit of a result."""

from __future__ import annotations

import itertools

import pytest
import torch

import oracles
from oracles import int32
from prefixfast import _rust
from prefixfast.attention import cpu_decode, ops
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.torch_decode import decode_fwd

LENGTHS = [9, 70, 3]  # rows of each prefix
COMPOSITIONS = [(0, 1), (1, 0), (2, 1, 0), (1,), (0, 0), (1, 2, 1), (), (0, 1, 2), (0, 1)]
STARTS = [0, 12, 90]  # first row of each prefix
NO_TILES = [0] * 4


def packed(order: tuple[int, ...], window: int) -> list[torch.Tensor]:
    """Output, log-sum-exp and all gradients of the `torch` backend; prefix p has the number ``order[p]``."""
    g = torch.Generator().manual_seed(0)
    tokens = [3 + i % 4 for i in range(len(COMPOSITIONS))]
    q = torch.randn(sum(tokens), 4, 16, generator=g)
    k, v = torch.randn(2, sum(tokens), 2, 16, generator=g)
    prefix_k, prefix_v = torch.randn(2, 100, 2, 16, generator=g)
    table = sorted((order[p], STARTS[p], n, n, p % 2, 0) for p, n in enumerate(LENGTHS))
    numbers = [[order[p] for p in own] for own in COMPOSITIONS]
    indptr = [0, *itertools.accumulate(map(len, numbers))]
    plan = _rust.plan_packed(
        int32(tokens),
        int32(indptr),
        int32([n for own in numbers for n in own]),
        int32([entry[1:] for entry in table], 5),
        tiles=(0, 0, 0),
    )
    found = oracles.tables(plan.buffer, plan.sections)
    shapes = {name: max(1, cols) for name, (_, _, cols) in plan.sections.items()}
    tables = [
        torch.tensor(found[name], dtype=torch.int32).view(-1, shapes[name]).squeeze(-1 if shapes[name] < 2 else ())
        for name in PackedTables._fields
    ]
    leaves = [t.requires_grad_() for t in (q, k, v, prefix_k, prefix_v)]
    o, lse = ops.attn(*leaves, tables, None, None, 0.25, window, 0.0, True, True, "torch", NO_TILES)
    return [o, lse, *torch.autograd.grad(o, leaves, torch.randn(o.shape, generator=g))]


@pytest.mark.parametrize("window", [0, 8])
def test_a_packed_forward_and_its_gradients(window):
    first, *others = (packed(order, window) for order in itertools.permutations(range(3)))
    for other in others:
        assert all(map(torch.equal, first, other))


def decode(order: tuple[int, ...], window: int, run) -> tuple[torch.Tensor, torch.Tensor]:
    """Result of a decode step; prefix p is block ``order[p]``."""
    g = torch.Generator().manual_seed(0)
    lens = [5 + 3 * i for i in range(len(COMPOSITIONS))]
    q = torch.randn(len(lens), 4, 32, generator=g)
    k, v = torch.randn(2, 100 + sum(lens), 2, 32, generator=g)
    ends = list(itertools.accumulate(lens))
    slots = torch.zeros(len(lens), max(lens), dtype=torch.int32)
    for row, (n, end) in enumerate(zip(lens, ends, strict=True)):
        slots[row, :n] = torch.arange(100 + end - n, 100 + end)
    blocks = [(start, n) for _, start, n in sorted(zip(order, STARTS, LENGTHS, strict=True))]
    requests = [Request(0, tuple((order[p], p % 2 == 0) for p in own)) for own in COMPOSITIONS]
    tables = decode_tables(lens, requests, blocks)
    return run(DecodeInputs(q, k, v, slots, None, None), tables, AttnOptions(0.2, window, 0.0))


BACKENDS = {
    "torch": lambda inputs, tables, options: decode_fwd(inputs, tables, int(tables.lens.max()), options),
    **{
        path: lambda inputs, tables, options, path=path: cpu_decode.decode(inputs, tables, options, path=path)
        for path in _rust.attend_paths()
    },
}


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_step(backend, window):
    first, *others = (decode(order, window, BACKENDS[backend]) for order in itertools.permutations(range(3)))
    for other in others:
        assert all(map(torch.equal, first, other))
