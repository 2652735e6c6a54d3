"""Layers in Rust: each instruction set against fp64, and gradients."""

import pytest
import torch
import torch.nn.functional as F

import prefixfast
from prefixfast import _rust
from prefixfast.model.cpu_layers import gated_silu, gelu, layer_norm, rms_norm

PATHS = _rust.attend_paths()
DTYPES = [torch.float32, torch.bfloat16]
HALF_BF16 = 2.0**-8  # largest relative error of a rounding to bf16


def exact_gelu(x: torch.Tensor, *, tanh: bool) -> torch.Tensor:
    """GELU in fp64, without torch's cancellation for negative numbers, and with the limits at infinities."""
    x = x.double()
    odds = torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)) if tanh else torch.special.ndtr(x)
    return torch.where(x == -torch.inf, 0.0, x * odds)


@pytest.mark.parametrize("tanh", [False, True], ids=["exact", "tanh"])
@pytest.mark.parametrize("path", PATHS)
def test_gelu_is_that_of_fp64(path, tanh):
    sizes = torch.cat([torch.linspace(0, 10, 30001), torch.logspace(-44, 38, 1001), torch.tensor([torch.inf])])
    x = torch.cat([sizes, -sizes]).float()
    expected, scale = exact_gelu(x, tanh=tanh), x.abs().double().clamp(1, 1e300)
    got = gelu(x, tanh=tanh, path=path).double()
    ends = got.isinf()
    assert torch.equal(got[ends], expected[ends])
    error = ((got - expected)[~ends].abs() / scale[~ends]).max()
    assert error <= 2e-7
    own = F.gelu(x, approximate="tanh" if tanh else "none").double()
    known = own.isfinite()
    assert error <= ((own - expected)[known].abs() / scale[known]).max()
    small = (x.abs() < 0.01) & (x.abs() > 1e-37)
    assert ((got - expected)[small] / expected[small]).abs().max() < 1e-6
    half = x.bfloat16()
    got, expected = gelu(half, tanh=tanh, path=path), exact_gelu(half, tanh=tanh)
    assert got.dtype == torch.bfloat16
    ends = got.isinf()
    assert torch.equal(got[ends].double(), expected[ends])
    assert ((got.double() - expected).abs() <= (HALF_BF16 + 1e-3) * expected.abs() + 1e-13)[~ends].all()


def hostile_rows(width: int) -> torch.Tensor:
    """Rows that are hard for fp32; the first four have no finite result, the others have one."""
    g = torch.Generator().manual_seed(width)
    noise = torch.randn(12, width, generator=g)
    noise[0, 0], noise[1, -1], noise[2, width // 2] = torch.inf, -torch.inf, torch.nan
    noise[3] = torch.nan
    noise[4], noise[5] = 1000.1, -3e-3  # constant
    noise[6] = noise[6] * 0.3 + 1e6
    noise[7] *= 1e17
    noise[8] *= 1e-40  # subnormal
    noise[9, -1] = 1e5
    noise[10] = 0
    return noise


def exact_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), 1e-5)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if b in (a, torch.float32)], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 5, 16, 63, 64, 80, 769, 1040])
def test_layer_norm_is_that_of_fp64(width, path, dtypes):
    dtype, weight_dtype = dtypes
    x = hostile_rows(width).to(dtype)
    g = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(width, generator=g).to(weight_dtype) for _ in range(2))
    got = layer_norm(x, weight, bias, 1e-5, path=path).double()
    expected = exact_layer_norm(x, weight, bias)
    assert got[:4].isnan().all()
    # A rounding of the scaled number, whose size the bias can hide, and one of the result.
    scaled = (expected - bias.double()).abs()
    bound = 4e-6 * (1 + scaled) + (HALF_BF16 * expected.abs() if dtype == torch.bfloat16 else 0)
    assert ((got - expected).abs() <= bound)[4:].all()


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if b in (a, torch.float32)], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 5, 16, 63, 64, 80, 769, 1040])
def test_rms_norm_is_that_of_fp64(width, path, dtypes):
    x = hostile_rows(width).to(dtypes[0])
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtypes[1])
    got, expected = rms_norm(x, weight, 1e-5, path=path).double(), exact_rms_norm(x, weight)
    assert got[2:4].isnan().all()
    assert not got[:2].isfinite().all(1).any()
    rounding = HALF_BF16 if dtypes[0] == torch.bfloat16 else 0
    assert ((got - expected).abs() <= (4e-6 + rounding) * expected.abs() + 1e-40)[4:].all()


@pytest.mark.parametrize("path", PATHS)
def test_gated_silu_is_that_of_fp64(path):
    sizes = torch.cat([torch.linspace(0, 20, 30001), torch.logspace(-30, 18, 1001), torch.tensor([100.0])])
    gate = torch.cat([sizes, -sizes]).float()
    up = torch.randn(len(gate), generator=torch.Generator().manual_seed(0))
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, HALF_BF16 + 1e-3)):
        g, u = gate.to(dtype), up.to(dtype)
        expected = F.silu(g.double()) * u.double()
        got = gated_silu(g, u, path=path)
        assert got.dtype == dtype
        assert ((got.double() - expected).abs() <= limit * expected.abs() + 1e-30).all()
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert gated_silu(odd, torch.ones(3), path=path)[0].isnan()
    assert gated_silu(torch.ones(3), odd, path=path)[0].isnan()


def grad(function, *inputs: torch.Tensor) -> torch.Tensor:
    """Gradients by all inputs of a weighted sum of a function's results, one behind the other."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-2, 3, out.shape[-1]).to(out.dtype).expand(out.shape)  # not contiguous
    return torch.stack(torch.autograd.grad(out, leaves, weights))


GRADIENTS = {
    "gelu": (lambda path: lambda x: gelu(x, tanh=False, path=path), F.gelu, 1),
    "gelu tanh": (lambda path: lambda x: gelu(x, tanh=True, path=path), lambda x: F.gelu(x, approximate="tanh"), 1),
    "gated silu": (lambda path: lambda x, y: gated_silu(x, y, path=path), lambda x, y: F.silu(x) * y, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_fp64(path, name, dtype):
    ours, exact, count = GRADIENTS[name]
    g = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(7, 163, generator=g) * torch.logspace(-4, 1.5, 163)).to(dtype) for _ in range(count)]
    got, expected = grad(ours(path), *inputs), grad(exact, *(x.double() for x in inputs))
    assert got.dtype == dtype
    scale = expected.abs() + 1e-2 * expected.abs().amax((0, 1))
    limit = 3e-6 if dtype == torch.float32 else 2 * HALF_BF16
    assert ((got.double() - expected).abs() / scale).max() < limit
    assert grad(ours(path), *(x * torch.nan for x in inputs)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16, 80, 769])
@pytest.mark.parametrize("path", PATHS)
def test_gradient_of_rms_norm_is_that_of_fp64(path, width, dtype):
    x = hostile_rows(width)[[5, 9, 10, 11]].to(dtype)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = grad(lambda x: rms_norm(x, weight, 1e-5, path=path), x)[0].double()
    expected = grad(lambda x: exact_rms_norm(x, weight), x.double())[0]
    limit = (3e-6 if dtype == torch.float32 else 3 * HALF_BF16) * expected.abs().amax(-1, keepdim=True)
    terms = 2e-6 * x.double().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt() * 3 * weight.double().abs().max()
    assert ((got - expected).abs() <= limit + terms).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_bits_of_a_row_depend_on_no_other_row_and_not_on_threads(path, dtype):
    x = torch.randn(90, 763, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, bias = x[0].contiguous(), x[1].contiguous()
    runs = [
        lambda t: layer_norm(t, weight, bias, 1e-5, path=path),
        lambda t: gelu(t, tanh=False, path=path),
        lambda t: gelu(t, tanh=True, path=path),
        lambda t: rms_norm(t, weight, 1e-5, path=path),
        lambda t: gated_silu(t, t, path=path),
        lambda t: grad(lambda x: gelu(x, tanh=True, path=path), t)[0],
        lambda t: grad(lambda x: rms_norm(x, weight, 1e-5, path=path), t)[0],
        lambda t: grad(lambda x: gated_silu(x, x, path=path), t)[0],
    ]
    threads = torch.get_num_threads()
    for run in runs:
        alone = torch.cat([run(row[None]) for row in x])
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(run(x), alone)
        finally:
            torch.set_num_threads(threads)


def test_parameters_of_another_size_are_refused():
    with pytest.raises(prefixfast.ConfigError):
        layer_norm(torch.ones(3, 7), torch.ones(8), torch.ones(8), 1e-5)
    with pytest.raises(prefixfast.ConfigError):
        layer_norm(torch.ones(3, 8), torch.ones(8).bfloat16(), torch.ones(8).bfloat16(), 1e-5)
    with pytest.raises(prefixfast.ConfigError):
        rms_norm(torch.ones(3, 7), torch.ones(8), 1e-5)
    with pytest.raises(prefixfast.ConfigError):
        rms_norm(torch.ones(3, 8), torch.ones(8).bfloat16(), 1e-5)
