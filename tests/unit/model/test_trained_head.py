"""Losses under a trained output layer equal torch's, with their gradients by hidden states, weight and bias."""

import pytest
import torch
import torch.nn.functional as F

from prefixfast.model.trained_head import ROWS, trained_losses


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_losses_and_gradients_equal_torchs(softcap, has_bias):
    g = torch.Generator().manual_seed(0)
    n, d, vocab = ROWS + 7, 6, 11
    hidden, weight, bias, scale = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, d), (vocab, d), (vocab,), (n,))
    )
    leaves = [t.requires_grad_() for t in (hidden, weight, *([bias] if has_bias else []))]
    targets = torch.randint(vocab, (n,), generator=g)
    out = F.linear(hidden, weight, bias if has_bias else None)
    expected = F.cross_entropy(softcap * torch.tanh(out / softcap) if softcap else out, targets, reduction="none")
    got = trained_losses(hidden, weight, bias if has_bias else None, targets, softcap)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad((loss * scale).sum(), leaves) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
