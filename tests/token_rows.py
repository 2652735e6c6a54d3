"""Random rows of token ids for the tiny models, and how far two prefixes are apart."""

from __future__ import annotations

from typing import Any

import numpy as np

import tiny
from prefixfast import Prefix


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """The target is the second half of each row."""
    g = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        ids = g.integers(3, tiny.VOCAB, int(g.integers(4, 12))).tolist()
        half = len(ids) // 2
        out.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return out


def distance(a: Prefix, b: Prefix) -> float:
    """The largest difference of two numbers at one place."""
    return max((a.kv[n] - b.kv[n]).abs().max().item() for n in a.kv)
