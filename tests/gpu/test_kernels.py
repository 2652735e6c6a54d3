"""On a CUDA device: every case of the kernels in every dtype, the same bits in every run (`make gpu`; needs no Rust extension)."""

import pytest
import torch

from prefixfast_kernels import cross_entropy
from prefixfast_kernels import tile_configs as tiles
from prefixfast_kernels.testing import decode_cases
from prefixfast_kernels.testing.packed_cases import CASES, FLOOR, NAMES, errors, triton, within
from prefixfast_kernels.testing.tables import relative_error

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


@pytest.mark.parametrize("mode", decode_cases.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", decode_cases.CASES)
def test_decode_equals_the_specification(name, dtype, mode):
    got, same = decode_cases.errors(decode_cases.CASES[name], dtype, mode, decode_cases.triton, device="cuda")
    assert within(got, same, FLOOR[dtype]), dict(zip(decode_cases.NAMES, got, strict=True))


@pytest.mark.parametrize("name", ["one for all", "composed", "forty rows of eight heads"])
def test_twenty_decode_steps_give_the_same_bits(name):
    case = decode_cases.CASES[name]
    p = (
        decode_cases.problem(case, decode_cases.sizes_of(case, torch.bfloat16, "cuda", "grouped, split"))
        .cast(torch.bfloat16)
        .to("cuda")
    )
    first = decode_cases.triton(p)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, decode_cases.triton(p), strict=True))


@pytest.mark.parametrize("capture", [False, True], ids=["called", "captured"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_decode_serves_other_tables(dtype, capture):
    for o, lse, dead in decode_cases.replayed(dtype, device="cuda", capture=capture):
        assert max(o, lse) < (4e-6 if dtype == torch.float32 else 2e-2)
        assert dead == 0


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_equals_torch(dtype, softcap):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g).cuda().to(dtype) for s in ((300, 64), (50257, 64)))
    targets = torch.randint(0, 50257, (300,), generator=g).cuda()
    found, expected = (
        cross_entropy.linear_cross_entropy(
            *(t.to(d) for t in (hidden, weight)), None, targets, softcap=softcap, backend=b
        )
        for d, b in ((dtype, "triton"), (torch.float64, "torch"))
    )
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert all(relative_error(a, b) < limit for a, b in zip(found, expected, strict=True))
