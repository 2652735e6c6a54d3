"""Logits and prefix gradients of a packed forward with mixed prefixes equal those of PEFT, for ten families."""

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
    assert effect > 1000 * TOLERANCE, "the prefixes must have an effect on the logits"
    assert compare_gradients(make, c) < TOLERANCE
