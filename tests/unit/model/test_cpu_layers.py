"""LayerNorm and GELU in Rust: each instruction set against fp64, and the forwards of modules that use them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

import prefixfast
from prefixfast import _rust
from prefixfast.model import cpu_layers
from prefixfast.model.cpu_layers import gelu, layer_norm
from prefixfast.model.prepack import prepack

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_bits_of_a_row_depend_on_no_other_row_and_not_on_threads(path, dtype):
    x = torch.randn(90, 763, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, bias = x[0].contiguous(), x[1].contiguous()
    runs = [
        lambda t: layer_norm(t, weight, bias, 1e-5, path=path),
        lambda t: gelu(t, tanh=False, path=path),
        lambda t: gelu(t, tanh=True, path=path),
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


class Layers(nn.Module):
    """A linear layer, without which nothing is packed, LayerNorm, and every kind of GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.acts = nn.ModuleList([nn.GELU(), nn.GELU("tanh"), ACT2FN["gelu"], ACT2FN["gelu_pytorch_tanh"]])

    def forward(self, x):
        x = self.norm(x)
        for act in self.acts:
            x = act(x)
        return x


needs_rust = pytest.mark.skipif(
    prepack(nn.Linear(8, 8)).why_not is not None or not cpu_layers._is_fast(), reason="torch's operators are used here"
)


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions in Rust that ran."""
    found = []
    for name in ("layer_norm", "gelu"):
        own = getattr(_rust, name)
        monkeypatch.setattr(_rust, name, lambda *args, own=own, name=name: (found.append(name), own(*args))[1])
    return found


@needs_rust
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forwards_run_in_rust_while_requests_run_and_are_restored(dtype, calls):
    model, x = Layers().to(dtype), torch.randn(3, 5, 32).to(dtype)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    expected = model(x).detach()
    packed = prepack(model)
    seen = []
    hook = model.norm.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    model(x)
    packed.begin()
    model(x)
    assert not calls, "with gradients the modules' own forwards run"
    with torch.no_grad():
        got = model(x)
        # In bf16 torch computes GELU without the hyperbolic tangent.
        assert calls == ["layer_norm", *["gelu"] * (4 if dtype == torch.float32 else 2)]
        assert len(seen) == 3, "hooks are called as before"
        model.norm.weight.data.mul_(2)
        assert torch.equal(model.norm(x), layer_norm(x, model.norm.weight, model.norm.bias, 1e-5))
        model.norm.weight.data.div_(2)
        packed.end()
        calls.clear()
        torch.testing.assert_close(model(x), expected)
        assert not calls
    torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    packed.undo()
    hook.remove()
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards


@needs_rust
def test_other_modules_and_tensors_keep_their_own_forward(calls):
    class Own(nn.LayerNorm):
        pass

    own, by_python, square = Own(32), ACT2FN["gelu_python"], nn.LayerNorm([4, 8])
    bare, mixed = nn.LayerNorm(32, bias=False), nn.LayerNorm(32).double()
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), own, by_python, square, bare)
    packed = prepack(model)
    packed.begin()
    x = torch.randn(6, 32)
    with torch.no_grad():
        for module in (own, by_python, bare):
            torch.testing.assert_close(module(x), type(module).forward(module, x))
        square(x.view(6, 4, 8))
        for odd in (x.double(), x.half(), x[:, ::2].T.contiguous().T, x[:0]):
            model[2](odd)
        model[1](torch.randn(32, 6).T)
        model[1].weight, model[1].bias = mixed.weight, mixed.bias
        model[1](x.double())
        with pytest.raises(RuntimeError):
            nn.LayerNorm.forward(model[1], x[:, :16].contiguous())
    assert not calls
    packed.undo()
    assert not any("forward" in m.__dict__ for m in model.modules())
