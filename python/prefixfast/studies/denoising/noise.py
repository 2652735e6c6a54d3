"""Noise of Lewis et al. (2020): text infilling and sentence order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

SHARE, MEAN = 0.3, 3.0  # of masked tokens, and of the tokens that one mask replaces


def infill(rng: Random, ids: Sequence[int], mask: int) -> list[int]:
    """Token ids in which spans are replaced by one mask each.

    The lengths of the spans are Poisson distributed. A span of no tokens inserts a mask. No two masks are neighbours.

    Args:
        rng: Generator of random numbers.
        ids: Token ids of a text without special tokens.
        mask: Token id of the mask.
    """
    missing = round(SHARE * len(ids))
    spans: list[int] = []
    kept = len(ids) - missing
    while missing > 0 and len(spans) <= kept:
        spans.append(min(_poisson(rng, MEAN), missing))
        missing -= spans[-1]
    if missing:  # there is no further place for a mask
        spans[-1] += missing
    places = dict(zip(rng.sample(range(kept + 1), len(spans)), spans, strict=True))
    found: list[int] = []
    position = 0
    for place in range(kept + 1):
        if place in places:
            found.append(mask)
            position += places[place]
        found += ids[position : position + 1]
        position += 1
    return found


def shuffle(rng: Random, sentences: Sequence[str]) -> list[str]:
    """The sentences in random order."""
    return rng.sample(sentences, len(sentences))


def _poisson(rng: Random, mean: float) -> int:
    """Poisson distributed number, by Knuth's product of uniform numbers."""
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        count += 1
    return count
