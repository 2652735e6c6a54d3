"""The `torch` backend against the reference: forward, all five gradients and decode; wrong tables change the result."""

import pytest
import torch

from prefixfast.attention import cpu_decode, ops
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.testing.packed_problem import PackedProblem, make_problem
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.testing.tolerance import FLOOR, relative_error, relative_errors, within_tolerance

FEW = [
    Request(7, ((0, True),)),
    Request(1, ((1, True),)),
    Request(12, ((0, True), (1, False))),
    Request(5),
    Request(3, ((1, True),)),
]
# Enough requests for length buckets.
MANY = [Request(1 + (5 * i) % 13, (((i // 6) % 2, i % 2 == 0),) if i % 5 else ()) for i in range(23)]
ONE_FOR_ALL = [Request(4 + i % 3, ((0, True),)) for i in range(18)]
CASES = {
    "few": (FEW, [6, 3]),
    "many": (MANY, [17, 300]),
    "one for all": (ONE_FOR_ALL, [10]),
    "none": ([Request(5), Request(8)], []),
    "longer": ([Request(40, ((0, True),))], [33]),
    "two orders": ([Request(7, ((0, True), (1, False))), Request(3, ((1, True), (0, True))), Request(4)], [6, 30]),
    "few infixes": (
        [
            Request(9, ((0, True),), infix_at=6),
            Request(5, ((1, True),)),
            Request(9, ((1, False), (0, True)), infix_at=8),
            Request(6, infix_at=3),
        ],
        [6, 3],
    ),
    "many infixes": (
        [Request(2 + (5 * i) % 13, ((i % 2, True),) if i % 5 else (), infix_at=i % 2) for i in range(23)],
        [17, 30],
    ),
    # Blocks of one length side by side, of few users each or of many, in one place of the compositions or in two.
    "one length": ([Request(1 + (5 * i) % 13, ((i // 4, True),)) for i in range(23)], [9] * 6),
    "one shape": ([Request(60, ((i, True),)) for i in range(4)], [9] * 4),
    "two places": ([Request(3 + i % 4, ((i % 2, True), (2 + i % 3, i % 2 == 0))) for i in range(18)], [5] * 5),
    "twice": ([Request(9, ((0, True), (0, True))), Request(3, ((0, True), (1, True), (0, False)))], [6, 3]),
}
HEADS = [(4, 4, 64), (6, 2, 80), (3, 1, 96), (9, 3, 128), (2, 2, 256)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NO_TILES = [0] * 4


def forward(p: PackedProblem, tensors, backend: str, window: int = 0, softcap: float = 0.0):
    tables = list(p.tables)
    return ops.attn(*tensors, tables, p.slots, None, p.scale, window, softcap, True, True, backend, NO_TILES)


def errors(p: PackedProblem, dtype, window, softcap, *, change=lambda got: got):
    """Relative errors of (o, lse, dq, dk, dv, dprefix_k, dprefix_v) against the reference in fp64.

    The first list has the errors of the torch backend, the second those of the reference in ``dtype``.
    """
    runs = []
    for cast, backend in (
        (p.cast(dtype), "torch"),
        (p.cast(dtype), "reference"),
        (p.cast(dtype).cast(torch.float64), "reference"),
    ):
        leaves = cast.leaves()
        o, lse = forward(cast, leaves, backend, window, softcap)
        grads = torch.autograd.grad(o, leaves, cast.do, allow_unused=True)
        filled = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))
        runs.append([o.detach(), lse, *filled])
    got, same_dtype, exact = change(runs[0]), runs[1], runs[2]
    return relative_errors(got, exact), relative_errors(same_dtype, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, dtype):
    requests, blocks = CASES[case]
    settings = [(0, 0.0), (5, 0.0), (0, 3.0), (9, 2.0), (2, 0.0)]
    for heads, (window, softcap) in [*zip(HEADS, settings, strict=True), *zip(HEADS[1:], settings, strict=False)]:
        got, same_dtype = errors(make_problem(requests, blocks, heads), dtype, window, softcap)
        assert within_tolerance(got, same_dtype, FLOOR[dtype]), (heads, window, softcap, got, same_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 30])
def test_continues_prompts_from_the_arena(window, dtype):
    """Later chunks of prompts, whose earlier keys lie scattered in the arena."""
    chunks = [
        Request(5, ((0, True),), cached=100),
        Request(1, ((0, True),), cached=64),
        Request(7, ((1, False),)),
        *[Request(20 + i, cached=7) for i in range(16)],
    ]
    for requests in (chunks, chunks[:3]):
        p = make_problem(requests, [48, 129], (4, 2, 64), arena=True)
        runs = []
        for cast, backend in ((dtype, "torch"), (dtype, "reference"), (torch.float64, "reference")):
            x = p.cast(dtype).cast(cast)
            runs.append(forward(x, x.inputs[:5], backend, window))
        got, same_dtype = (relative_errors(run, runs[2]) for run in runs[:2])
        assert within_tolerance(got, same_dtype, FLOOR[dtype]), (got, same_dtype)
        inputs, tables = p.inputs, list(p.tables)
        options = (p.scale, window, 0.0, True, True, "torch", NO_TILES)
        wrong, _ = ops.attn(*inputs[:5], tables, inputs.slots.roll(1), None, *options)
        assert relative_error(wrong, runs[2][0]) > 0.01


MISTAKES = {
    "prefix missing": lambda t: t._replace(
        use=t.use[:0],
        use_indptr=torch.zeros_like(t.use_indptr),
        block=t.block[:0],
        span=t.span[:0],
        user_indptr=t.user_indptr[:1],
    ),
    "prefix row off by one": lambda t: t._replace(block=t.block + torch.tensor([1, 0], dtype=torch.int32)),
    "prefix one row short": lambda t: t._replace(block=t.block - torch.tensor([0, 1], dtype=torch.int32)),
    "blocks exchanged": lambda t: t._replace(block=t.block.flip(0)),
    "window slides over none": lambda t: t._replace(user_slides=torch.zeros_like(t.user_slides)),
    "window off by one": lambda t: t._replace(user_pos=t.user_pos + 1),
    "one user missing": lambda t: t._replace(
        user=t.user.clone().index_fill_(0, torch.tensor([0]), int(t.user[1])),
        span=t.span * torch.tensor([1, 1, 0], dtype=torch.int32),
    ),
    "keys of a neighbour": lambda t: t._replace(
        seg=t.seg + torch.tensor([1, 0, 0, 0], dtype=torch.int32) * (torch.arange(len(t.seg)) == 0)[:, None].int()
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_tables_change_the_result(mistake):
    p = make_problem(FEW, [6, 3], (4, 2, 16))
    wrong: PackedTables = MISTAKES[mistake](p.tables)
    tensors = p.leaves()
    exact, _ = forward(p, tensors, "reference", 4)
    right, _ = forward(p, tensors, "torch", 4)
    bad, _ = ops.attn(*tensors, list(wrong), None, None, p.scale, 4, 0.0, True, True, "torch", NO_TILES)
    assert relative_error(right, exact) < 1e-12
    assert not relative_error(bad, exact) < 1e-6  # NaN counts as changed


@pytest.mark.parametrize("mistake", ["log base", "prefix gradient of one user", "dq of the prefix part"])
def test_wrong_results_are_out_of_tolerance(mistake):
    p = make_problem(FEW, [6, 3], (4, 2, 16))
    output = {"log base": 1, "prefix gradient of one user": 5, "dq of the prefix part": 2}[mistake]

    def change(got):
        got = list(got)
        if mistake == "log base":
            got[output] = got[output] / torch.log(torch.tensor(2.0))
        else:
            part = [Request(s.length, s.blocks if j == 0 else ()) for j, s in enumerate(FEW)]
            alone = make_problem([*part[:1], *FEW[1:2], *part[2:]], [6, 3], (4, 2, 16))
            tensors = p.cast(torch.float32).leaves()
            o, _ = forward(alone, tensors, "torch")
            got[output] = torch.autograd.grad(o, tensors, p.do.float())[output - 2]
        return got

    floor = FLOOR[torch.float32]
    assert within_tolerance(*errors(p, torch.float32, 0, 0.0), floor)
    assert not within_tolerance(*errors(p, torch.float32, 0, 0.0, change=change), floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (4, 0.0), (0, 2.0), (6, 3.0)])
@pytest.mark.parametrize("heads", HEADS[:4])
def test_decode_equals_reference(heads, window, softcap, dtype, monkeypatch):
    # The Rust backend would run instead; tests/unit/attention/test_cpu_decode.py tests it.
    monkeypatch.setattr(cpu_decode, "unsupported", lambda *_, **__: ["any call in this test"])
    hq, h, d = heads
    g = torch.Generator().manual_seed(1)
    lens, rows = [9, 1, 14, 3, 7, 2], 40
    requests = [
        Request(0, ((0, True),)),
        Request(0),
        Request(0, ((1, True), (0, False))),
        *[Request(0, ((1, True),))] * 3,
    ]
    blocks = [(2, 5), (10, 8)]
    q = torch.randn(len(lens), hq, d, generator=g, dtype=torch.float64)
    k, v = (torch.randn(rows + sum(lens), h, d, generator=g, dtype=torch.float64) for _ in range(2))
    slots = (rows + torch.randperm(sum(lens), generator=g)).int()
    slot_table = torch.full((len(lens), 20), 10**6, dtype=torch.int32)  # entries past a row's end are never read
    at = 0
    for i, n in enumerate(lens):
        slot_table[i, :n] = slots[at : at + n]
        at += n
    tables = list(decode_tables(lens, requests, blocks))

    def run(backend, dtype):
        tensors, options = (t.to(dtype) for t in (q, k, v)), (d**-0.5, window, softcap)
        return ops.attn_decode(*tensors, None, None, slot_table, tables, None, max(lens), *options, backend, 0)

    exact = run("reference", torch.float64)
    got, same_dtype = (relative_errors(run(backend, dtype), exact) for backend in ("torch", "reference"))
    assert within_tolerance(got, same_dtype, FLOOR[dtype]), (got, same_dtype)
