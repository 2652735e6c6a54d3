"""Every case of the kernels in every dtype on a CUDA device, and the same bits in every run.

`make gpu` runs these tests. They need no Rust extension.
"""

import pytest
import torch

from prefixfast_kernels import cross_entropy
from prefixfast_kernels.inputs import OutputLayer
from prefixfast_kernels.testing import decode_cases
from prefixfast_kernels.testing.packed_cases import CASES, OUTPUT_NAMES, output_errors, run_triton
from prefixfast_kernels.testing.tolerance import FLOOR, relative_errors, within_tolerance
from prefixfast_kernels.tile_selection import tile_sizes

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case_sizes(case, dtype):
    """Shipped tile sizes for the heads of a case."""
    hq, h, d = case.heads
    return tile_sizes(torch.device("cuda"), dtype, ((hq // h, d),))._replace(depth=case.depth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification(name, dtype):
    case = CASES[name]
    got, same_dtype = output_errors(case, dtype, case_sizes(case, dtype), run_triton, device="cuda")
    assert within_tolerance(got, same_dtype, FLOOR[dtype]), dict(zip(OUTPUT_NAMES, got, strict=True))


@pytest.mark.parametrize("name", ["one for all", "one each, short", "composed"])
def test_twenty_runs_give_the_same_bits(name):
    case = CASES[name]
    sizes = case_sizes(case, torch.bfloat16)
    p = case.problem(sizes).cast(torch.bfloat16).to("cuda")
    first = run_triton(p, case, sizes)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run_triton(p, case, sizes), strict=True))


@pytest.mark.parametrize("mode", decode_cases.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", decode_cases.CASES)
def test_decode_equals_the_specification(name, dtype, mode):
    case, run = decode_cases.CASES[name], decode_cases.run_triton
    got, same_dtype = decode_cases.output_errors(case, dtype, mode, run, device="cuda")
    assert within_tolerance(got, same_dtype, FLOOR[dtype]), dict(zip(decode_cases.OUTPUT_NAMES, got, strict=True))


@pytest.mark.parametrize("name", ["one for all", "composed", "forty rows of eight heads"])
def test_twenty_decode_steps_give_the_same_bits(name):
    case = decode_cases.CASES[name]
    sizes = decode_cases.case_sizes(case, torch.bfloat16, "cuda", "grouped, split")
    p = decode_cases.make_problem(case, sizes).cast(torch.bfloat16).to("cuda")
    first = decode_cases.run_triton(p)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, decode_cases.run_triton(p), strict=True))


@pytest.mark.parametrize("capture", [False, True], ids=["called", "captured"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_decode_step_works_with_other_tables(dtype, capture):
    for o, lse, padding in decode_cases.replay_errors(dtype, device="cuda", capture=capture):
        assert max(o, lse) < (4e-6 if dtype == torch.float32 else 2e-2)
        assert padding == 0


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_equals_torch(dtype, softcap):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g).cuda().to(dtype) for s in ((300, 64), (50257, 64)))
    targets = torch.randint(0, 50257, (300,), generator=g).cuda()
    found, expected = (
        cross_entropy.linear_cross_entropy(hidden.to(d), OutputLayer(weight.to(d), None, softcap), targets, backend=b)
        for d, b in ((dtype, "triton"), (torch.float64, "torch"))
    )
    assert max(relative_errors(found, expected)) < (1e-5 if dtype == torch.float32 else 2e-2)
