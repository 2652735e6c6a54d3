"""The likeliest token, found in pieces."""

import pytest
import torch

from prefixfast.engine.search import PIECE, likeliest


@pytest.mark.parametrize("vocab", [5, PIECE, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1, 50257])
def test_is_the_first_largest(vocab):
    g = torch.Generator().manual_seed(vocab)
    scores = torch.randn(64, vocab, generator=g)
    ties = torch.randint(0, 3, (64, vocab), generator=g).float()
    edges = torch.full((6, vocab), -torch.inf)
    for row, at in enumerate((0, vocab - 1, vocab // 2, min(PIECE, vocab - 1), vocab // PIECE * PIECE - 1)):
        edges[row, at] = 1.0  # the last row stays -inf throughout
    lost = scores.clone()
    lost[:, vocab // 3] = torch.nan
    for x in (scores, ties, edges, lost, scores.bfloat16().float()):
        assert torch.equal(likeliest(x), x.argmax(-1))
