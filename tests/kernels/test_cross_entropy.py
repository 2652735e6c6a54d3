"""Cross-entropy from hidden states against the specification: losses and gradients, all backends, chunk borders, planted mistakes."""

import pytest
import torch

from prefixfast_kernels import cross_entropy, reference
from prefixfast_kernels.testing.tables import relative_error

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
RUNS = [("torch", torch.float64), *((b, d) for b in ("torch", "triton") for d in (torch.float32, torch.bfloat16))]
SHAPES = [(7, 16, 50), (33, 8, 10001), (1, 4, 3), (130, 32, 257)]


def make(n, d, v, dtype, *, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((n, d), (v, d)))
    return (
        hidden,
        weight,
        torch.randn(v, generator=g, dtype=torch.float64).to(dtype) if bias else None,
        torch.randint(0, v, (n,), generator=g),
    )


def exact(hidden, weight, bias, targets, softcap):
    """Losses and gradients of the specification in fp64."""
    leaf = hidden.double().requires_grad_()
    losses = reference.linear_cross_entropy(
        leaf, weight.double(), None if bias is None else bias.double(), targets, softcap=softcap
    )
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_equals_the_specification(backend, dtype, shape, bias, softcap, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * shape[2] * 9)  # nine rows a chunk
    given = make(*shape, dtype, bias=bias)
    losses, grad = cross_entropy.linear_cross_entropy(*given, softcap=softcap, backend=backend)
    for got, expected in zip((losses, grad), exact(*given, softcap), strict=True):
        assert relative_error(got, expected) < LIMIT[dtype]


def test_without_gradient_only_losses_are_made():
    given = make(9, 8, 40, torch.float32, bias=True)
    losses, grad = cross_entropy.linear_cross_entropy(*given, needs_grad=False)
    assert grad.numel() == 0
    assert relative_error(losses, exact(*given, 0.0)[0]) < 3e-6


def test_large_logits_do_not_overflow():
    hidden, weight, _, targets = make(9, 8, 40, torch.float32, bias=False)
    given = (hidden * 1e3, weight, None, targets)
    for backend in ("torch", "triton"):
        losses, grad = cross_entropy.linear_cross_entropy(*given, backend=backend)
        for got, expected in zip((losses, grad), exact(*given, 0.0), strict=True):
            assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("mistake", ["target off by one", "one row of the vocabulary less", "cap forgotten"])
def test_planted_mistakes_are_caught(mistake):
    hidden, weight, bias, targets = make(9, 8, 40, torch.float32, bias=True)
    right = exact(hidden, weight, bias, targets, 3.0)
    wrong = {
        "target off by one": ((hidden, weight, bias, (targets + 1) % 40), 3.0),
        "one row of the vocabulary less": ((hidden, weight[:-1], bias[:-1], targets % 39), 3.0),
        "cap forgotten": ((hidden, weight, bias, targets), 0.0),
    }
    given, softcap = wrong[mistake]
    losses, _ = cross_entropy.linear_cross_entropy(*given, softcap=softcap)
    assert relative_error(losses, right[0]) > 1e-3
