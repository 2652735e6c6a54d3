"""The `torch` backend against the reference: forward, all five gradients, decode; and planted mistakes that the same comparison must catch."""

import pytest
import torch

from prefixfast.attention import backends, ops
from prefixfast.attention import cpu_decode as attend
from prefixfast_kernels import reference
from prefixfast_kernels.tables import PackedTables
from prefixfast_kernels.testing.tables import Problem, Request, decode_tables, problem, relative_error

FEW = [
    Request(7, ((0, True),)),
    Request(1, ((1, True),)),
    Request(12, ((0, True), (1, False))),
    Request(5),
    Request(3, ((1, True),)),
]
MANY = [
    Request(1 + (5 * i) % 13, (((i // 6) % 2, i % 2 == 0),) if i % 5 else ()) for i in range(23)
]  # enough for buckets
ONE_FOR_ALL = [Request(4 + i % 3, ((0, True),)) for i in range(18)]
CASES = {
    "few": (FEW, [6, 3]),
    "many": (MANY, [17, 300]),
    "one for all": (ONE_FOR_ALL, [10]),
    "none": ([Request(5), Request(8)], []),
    "longer": ([Request(40, ((0, True),))], [33]),
}
# Rounding floors: some gradients are zero in exact arithmetic (a window of one token without a prefix), so a ratio alone would divide by nothing.
FLOOR = {torch.float64: 1.5e-14, torch.float32: 4e-6, torch.bfloat16: 2e-3}  # bf16: half a unit in the last place
HEADS = [(4, 4, 64), (6, 2, 80), (3, 1, 96), (9, 3, 128), (2, 2, 256)]


def forward(p: Problem, tensors, backend: str, window: int, softcap: float):
    q, k, v, pk, pv = tensors
    return ops.attn(q, k, v, pk, pv, list(p.tables), None, None, p.scale, window, softcap, True, True, backend, [0] * 4)


def errors(p: Problem, dtype, window, softcap, *, change=lambda got: got):
    """Relative errors of (o, lse, dq, dk, dv, dprefix_k, dprefix_v) against the reference in fp64: of the torch backend, and of the reference in ``dtype``."""
    runs = []
    for problem_, backend in (
        (p.cast(dtype), "torch"),
        (p.cast(dtype), "reference"),
        (p.cast(dtype).cast(torch.float64), "reference"),
    ):
        tensors = problem_.inputs()
        o, lse = forward(problem_, tensors, backend, window, softcap)
        grads = torch.autograd.grad(o, tensors, problem_.do, allow_unused=True)
        runs.append(
            [o.detach(), lse, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True))]
        )
    got, same, exact = change(runs[0]), runs[1], runs[2]
    return [relative_error(a, b) for a, b in zip(got, exact, strict=True)], [
        relative_error(a, b) for a, b in zip(same, exact, strict=True)
    ]


def within(got, same, dtype):
    """At most twice (gradients three times) the error of the same dtype's plain torch, above a rounding floor."""
    floor = FLOOR[dtype]
    return all(e <= (2 if i < 2 else 3) * s + floor for i, (e, s) in enumerate(zip(got, same, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, dtype):
    sequences, blocks = CASES[case]
    settings = [(0, 0.0), (5, 0.0), (0, 3.0), (9, 2.0), (2, 0.0)]
    for heads, (window, softcap) in [*zip(HEADS, settings, strict=True), *zip(HEADS[1:], settings, strict=False)]:
        p = problem(sequences, blocks, num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2])
        got, same = errors(p, dtype, window, softcap)
        assert within(got, same, dtype), (heads, window, softcap, got, same)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 30])
def test_continues_prompts_from_the_arena(window, dtype):
    """Later chunks of prompts: earlier keys lie in the arena, scattered."""
    chunks = [
        Request(5, ((0, True),), cached=100),
        Request(1, ((0, True),), cached=64),
        Request(7, ((1, False),)),
        *[Request(20 + i, cached=7) for i in range(16)],
    ]
    for requests in (chunks, chunks[:3]):
        p = problem(requests, [48, 129], num_heads=4, num_kv_heads=2, head_dim=64, arena=True)
        runs = []
        for cast, backend in ((dtype, "torch"), (dtype, "reference"), (torch.float64, "reference")):
            x = p.cast(dtype).cast(cast)
            runs.append(
                ops.attn(
                    x.q,
                    x.k,
                    x.v,
                    x.prefix_k,
                    x.prefix_v,
                    list(x.tables),
                    x.slots,
                    None,
                    x.scale,
                    window,
                    0.0,
                    True,
                    True,
                    backend,
                    [0] * 4,
                )
            )
        got, same = ([relative_error(a, b) for a, b in zip(run, runs[2], strict=True)] for run in runs[:2])
        assert within(got, same, dtype), (got, same)
        wrong = ops.attn(
            p.q,
            p.k,
            p.v,
            p.prefix_k,
            p.prefix_v,
            list(p.tables),
            p.slots.roll(1),
            None,
            p.scale,
            window,
            0.0,
            True,
            True,
            "torch",
            [0] * 4,
        )
        assert relative_error(wrong[0], runs[2][0]) > 0.01


MISTAKES = {
    "prefix dropped": lambda t: t._replace(
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
    "one user forgotten": lambda t: t._replace(
        user=t.user.clone().index_fill_(0, torch.tensor([0]), int(t.user[1])),
        span=t.span * torch.tensor([1, 1, 0], dtype=torch.int32),
    ),
    "own keys of a neighbour": lambda t: t._replace(
        seg=t.seg + torch.tensor([1, 0, 0, 0], dtype=torch.int32) * (torch.arange(len(t.seg)) == 0)[:, None].int()
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake):
    p = problem(FEW, [6, 3], num_heads=4, num_kv_heads=2, head_dim=16)
    wrong: PackedTables = MISTAKES[mistake](p.tables)
    tensors = p.inputs()
    q, k, v, pk, pv = tensors
    exact = forward(p, tensors, "reference", 4, 0.0)[0]
    right = forward(p, tensors, "torch", 4, 0.0)[0]
    bad, _ = ops.attn(q, k, v, pk, pv, list(wrong), None, None, p.scale, 4, 0.0, True, True, "torch", [0] * 4)
    assert relative_error(right, exact) < 1e-12
    assert not relative_error(bad, exact) < 1e-6  # NaN counts as caught


@pytest.mark.parametrize("mistake", ["log base", "prefix gradient of one user", "dq of the prefix part"])
def test_planted_mistakes_in_results_are_caught(mistake):
    p = problem(FEW, [6, 3], num_heads=4, num_kv_heads=2, head_dim=16)
    plain = {"log base": 1, "prefix gradient of one user": 5, "dq of the prefix part": 2}

    def change(got):
        got = list(got)
        i = plain[mistake]
        if mistake == "log base":
            got[i] = got[i] / torch.log(torch.tensor(2.0))
        else:
            part = [Request(s.length, s.blocks if j == 0 else ()) for j, s in enumerate(FEW)]
            alone = problem([*part[:1], *FEW[1:2], *part[2:]], [6, 3], num_heads=4, num_kv_heads=2, head_dim=16)
            tensors = p.cast(torch.float32).inputs()
            o = forward(alone, tensors, "torch", 0, 0.0)[0]
            got[i] = torch.autograd.grad(o, tensors, p.do.float())[i - 2]
        return got

    good, same = errors(p, torch.float32, 0, 0.0)
    assert within(good, same, torch.float32)
    bad, same = errors(p, torch.float32, 0, 0.0, change=change)
    assert not within(bad, same, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (4, 0.0), (0, 2.0), (6, 3.0)])
@pytest.mark.parametrize("heads", HEADS[:4])
def test_decode_equals_reference(heads, window, softcap, dtype, monkeypatch):
    monkeypatch.setattr(attend, "cannot", lambda *_: {"anything (a test)": True})  # test_attend.py has it
    hq, h, d = heads
    g = torch.Generator().manual_seed(1)
    lens, rows = [9, 1, 14, 3, 7, 2], 40
    sequences = [
        Request(0, ((0, True),)),
        Request(0),
        Request(0, ((1, True), (0, False))),
        *[Request(0, ((1, True),))] * 3,
    ]
    blocks = [(2, 5), (10, 8)]
    q = torch.randn(len(lens), hq, d, generator=g, dtype=torch.float64)
    k, v = (torch.randn(rows + sum(lens), h, d, generator=g, dtype=torch.float64) for _ in range(2))
    slots = (rows + torch.randperm(sum(lens), generator=g)).int()
    table = torch.full((len(lens), 20), 10**6, dtype=torch.int32)  # entries past a row's end are never read
    at = 0
    for i, n in enumerate(lens):
        table[i, :n] = slots[at : at + n]
        at += n
    tables = decode_tables(lens, sequences, blocks)

    def run(backend, dtype):
        args = [t.to(dtype) for t in (q, k, v)]
        return ops.attn_decode(
            *args, None, None, table, list(tables), None, max(lens), d**-0.5, window, softcap, backend, 0
        )

    exact = run("reference", torch.float64)
    rounded = [relative_error(a, b) for a, b in zip(run("reference", dtype), exact, strict=True)]
    got = [relative_error(a, b) for a, b in zip(run("torch", dtype), exact, strict=True)]
    assert all(a <= 2 * b + FLOOR[dtype] for a, b in zip(got, rounded, strict=True)), (got, rounded)


def test_what_a_backend_cannot_do_falls_back_and_is_logged(caplog):
    p = problem([Request(5)], [], num_heads=2, num_kv_heads=2, head_dim=16)
    backends.log_fallback.cache_clear()
    bias = torch.zeros(2, 5, dtype=torch.float64)
    o, _ = ops.attn(
        p.q, p.k, p.v, None, None, list(p.tables), None, bias, p.scale, 0, 0.0, True, True, "torch", [0] * 4
    )
    expected, _ = reference.attn(p.q, p.k, p.v, None, None, p.tables, scale=p.scale)
    assert torch.allclose(o, expected)
    assert "position bias" in caplog.text
