"""Cross-entropy of logits in Rust: each instruction set against fp64, its gradient, and where it is used."""

import pytest
import torch
import torch.nn.functional as F

import prefixfast
from prefixfast import _rust
from prefixfast.attention import cpu_softmax_loss, ops
from prefixfast.attention.cpu_softmax_loss import softmax_loss
from prefixfast_kernels import cross_entropy

PATHS = _rust.attend_paths()
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 2, 15, 16, 17, 64, 1000, 4099]


def case(width, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, width, generator=g) * torch.tensor([0, 1e-3, 0.1, 1, 3, 10, 30, 90, 1000.0])[:, None]
    return logits.to(dtype), torch.randint(0, width, (9,), generator=g)


def exact(logits, targets):
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", PATHS)
def test_losses_and_gradients_are_those_of_fp64(path, width, dtype):
    logits, targets = case(width, dtype)
    expected, gradient = exact(logits, targets)
    before = logits.clone()
    losses = softmax_loss(logits, targets, needs_grad=False, path=path)
    assert torch.equal(logits, before)
    assert torch.equal(softmax_loss(logits, targets, needs_grad=True, path=path), losses)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=2e-6)
    limit = 3e-7 if dtype == torch.float32 else 2.0**-9
    assert ((logits.double() - gradient).abs() <= limit * (1 + gradient.abs())).all()


@pytest.mark.parametrize("path", PATHS)
def test_numbers_that_are_not_finite(path):
    logits = torch.randn(5, 50)
    logits[0, 3], logits[1, 4], logits[2, 5], logits[3, :] = torch.nan, torch.inf, -torch.inf, -torch.inf
    targets = torch.tensor([1, 1, 1, 1, 1])
    losses = softmax_loss(logits.clone(), targets, needs_grad=True, path=path)
    assert losses[[0, 1, 3]].isnan().all()
    torch.testing.assert_close(losses[[2, 4]], F.cross_entropy(logits[[2, 4]], targets[:2], reduction="none"))


@pytest.mark.parametrize("path", PATHS)
def test_a_row_depends_on_no_other_row_and_not_on_threads(path):
    logits, targets = torch.randn(40, 997), torch.arange(40)
    rows = zip(logits.split(1), targets.split(1), strict=True)
    alone = [softmax_loss(row.clone(), target, needs_grad=False, path=path) for row, target in rows]
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(softmax_loss(logits.clone(), targets, needs_grad=False, path=path), torch.cat(alone))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_a_target_outside_of_the_vocabulary_is_refused_before_anything_is_written(wrong):
    logits = torch.randn(2, 50)
    before = logits.clone()
    with pytest.raises(prefixfast.ConfigError):
        softmax_loss(logits, torch.tensor([0, wrong]), needs_grad=True)
    assert torch.equal(logits, before)


@pytest.mark.skipif(not cpu_softmax_loss.is_used(torch.float32, torch.device("cpu"), 0.0), reason="not used here")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_operator_uses_it_where_it_is_right(dtype, has_bias, softcap, monkeypatch):
    calls = []
    own = _rust.softmax_loss
    monkeypatch.setattr(_rust, "softmax_loss", lambda *a: (calls.append(a), own(*a))[1])
    monkeypatch.setattr(cross_entropy, "LARGE_CHUNK_BYTES", 4 * 300 * 5)  # five rows in a chunk
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(13, 32, generator=g).to(dtype), torch.randn(300, 32, generator=g).to(dtype)
    bias = torch.randn(300, generator=g).to(dtype) if has_bias else None
    targets = torch.randint(0, 300, (13,), generator=g)
    leaf = hidden.clone().requires_grad_()
    losses = ops.cross_entropy(leaf, weight, bias, targets, softcap, "torch")
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    is_used = dtype in DTYPES and not softcap and (not has_bias or dtype == torch.float32)
    assert len(calls) == (3 if is_used else 0)
    wide = hidden.double().requires_grad_()
    logits = wide @ weight.double().T + (0 if bias is None else bias.double())
    expected = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="none")
    (exact_grad,) = torch.autograd.grad(expected.sum(), wide)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=limit, atol=limit)
    assert (grad.double() - exact_grad).norm() <= limit * exact_grad.norm()
