"""Cross-entropy from hidden states against the specification: losses, gradients, chunk borders, wrong inputs."""

import pytest
import torch

from prefixfast_kernels import cross_entropy, reference
from prefixfast_kernels.inputs import OutputLayer
from prefixfast_kernels.testing.tolerance import relative_error

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
RUNS = [("torch", torch.float64), *((b, d) for b in ("torch", "triton") for d in (torch.float32, torch.bfloat16))]
SHAPES = [(7, 16, 50), (33, 8, 10001), (1, 4, 3), (130, 32, 257)]


def make(n, d, v, dtype, *, bias, softcap=0.0, seed=0):
    """Random hidden states ``[n, d]``, output layer of ``v`` tokens and targets."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((n, d), (v, d)))
    layer = OutputLayer(weight, torch.randn(v, generator=g, dtype=torch.float64).to(dtype) if bias else None, softcap)
    return hidden, layer, torch.randint(0, v, (n,), generator=g)


def exact(hidden, layer, targets):
    """Losses and gradients of the specification in fp64."""
    leaf = hidden.double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.double()
    losses = reference.linear_cross_entropy(leaf, OutputLayer(layer.weight.double(), bias, layer.softcap), targets)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_equals_the_specification(backend, dtype, shape, bias, softcap, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * shape[2] * 9)  # nine rows in a chunk
    args = make(*shape, dtype, bias=bias, softcap=softcap)
    losses, grad = cross_entropy.linear_cross_entropy(*args, backend=backend)
    for got, expected in zip((losses, grad), exact(*args), strict=True):
        assert relative_error(got, expected) < LIMIT[dtype]


def test_without_needs_grad_the_gradient_is_empty():
    args = make(9, 8, 40, torch.float32, bias=True)
    losses, grad = cross_entropy.linear_cross_entropy(*args, needs_grad=False)
    assert grad.numel() == 0
    assert relative_error(losses, exact(*args)[0]) < 3e-6


def test_large_logits_do_not_overflow():
    hidden, layer, targets = make(9, 8, 40, torch.float32, bias=False)
    args = (hidden * 1e3, layer, targets)
    for backend in ("torch", "triton"):
        losses, grad = cross_entropy.linear_cross_entropy(*args, backend=backend)
        for got, expected in zip((losses, grad), exact(*args), strict=True):
            assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("mistake", ["target off by one", "last row of the vocabulary missing", "soft cap missing"])
def test_wrong_inputs_change_the_losses(mistake):
    hidden, layer, targets = make(9, 8, 40, torch.float32, bias=True, softcap=3.0)
    right, _ = exact(hidden, layer, targets)
    wrong = {
        "target off by one": (layer, (targets + 1) % 40),
        "last row of the vocabulary missing": (OutputLayer(layer.weight[:-1], layer.bias[:-1], 3.0), targets % 39),
        "soft cap missing": (layer._replace(softcap=0.0), targets),
    }
    losses, _ = cross_entropy.linear_cross_entropy(hidden, *wrong[mistake])
    assert relative_error(losses, right) > 1e-3
