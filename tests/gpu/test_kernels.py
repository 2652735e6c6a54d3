"""On a CUDA device: every case of the kernels in every dtype, the same bits in every run, and forwards captured in a CUDA graph (`make gpu`)."""

import pytest
import torch

import prefixfast
import tiny
from prefixfast.plan import plain_plan
from prefixfast_kernels import cross_entropy, tiles
from prefixfast_kernels.cases import CASES, FLOOR, NAMES, errors, triton, within
from prefixfast_kernels.checks import relative_error

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sizes_of(case, dtype):
    hq, h, d = case.heads
    return tiles.sizes(torch.device("cuda"), dtype, ((hq // h, d),))._replace(depth=case.depth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification(name, dtype):
    case = CASES[name]
    got, same = errors(case, dtype, sizes_of(case, dtype), triton, device="cuda")
    assert within(got, same, FLOOR[dtype]), dict(zip(NAMES, got, strict=True))


@pytest.mark.parametrize("name", ["one for all", "one each, short", "composed"])
def test_twenty_runs_give_the_same_bits(name):
    case = CASES[name]
    sizes = sizes_of(case, torch.bfloat16)
    p = case.problem(sizes).cast(torch.bfloat16).to("cuda")
    first = triton(p, case, sizes)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, triton(p, case, sizes), strict=True))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_equals_torch(dtype, softcap):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g).cuda().to(dtype) for s in ((300, 64), (50257, 64)))
    targets = torch.randint(0, 50257, (300,), generator=g).cuda()
    found, expected = (
        cross_entropy.linear_cross_entropy(*(t.to(d) for t in (hidden, weight)), None, targets, softcap=softcap, backend=b)
        for d, b in ((dtype, "triton"), (torch.float64, "torch"))
    )
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert all(relative_error(a, b) < limit for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_attached_forward_is_captured(family):
    """No host synchronization in a packed forward: captured once, replayed on other tokens."""
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
