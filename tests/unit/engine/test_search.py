"""The most likely token, searched in chunks of the vocabulary."""

import pytest
import torch

from prefixfast.engine.search import CHUNK, argmax_rows


@pytest.mark.parametrize("vocab", [5, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 50257])
def test_argmax_is_the_first_largest_entry(vocab):
    g = torch.Generator().manual_seed(vocab)
    scores = torch.randn(64, vocab, generator=g)
    ties = torch.randint(0, 3, (64, vocab), generator=g).float()
    edges = torch.full((6, vocab), -torch.inf)
    for row, at in enumerate((0, vocab - 1, vocab // 2, min(CHUNK, vocab - 1), vocab // CHUNK * CHUNK - 1)):
        edges[row, at] = 1.0  # the last row is -inf everywhere
    with_nan = scores.clone()
    with_nan[:, vocab // 3] = torch.nan
    for x in (scores, ties, edges, with_nan, scores.bfloat16().float()):
        assert torch.equal(argmax_rows(x), x.argmax(-1))
