"""Ten families: a packed mixed-prefix forward equals PEFT one by one, in logits and in prefix gradients."""

import pytest

import tiny
from parity.packed import case, compare_gradients, compare_logits

TOLERANCE = 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_gradients_equal_peft(family):
    def make():
        return tiny.make(family)

    c = case(make, vocab=tiny.VOCAB, longest=3 * tiny.WINDOW)
    error, effect = compare_logits(make, c)
    assert error < TOLERANCE
    assert effect > 1000 * TOLERANCE, "the prefixes must matter for this comparison to mean something"
    assert compare_gradients(make, c) < TOLERANCE
