"""Random rows of token ids for the tiny models, and the distance of two prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np

import tiny
from prefixfast import Prefix


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Random rows of token ids, with the second half of each row as target."""
    g = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        ids = g.integers(3, tiny.VOCAB, int(g.integers(4, 12))).tolist()
        half = len(ids) // 2
        out.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return out


def distance(a: Prefix, b: Prefix) -> float:
    """Largest absolute difference between the tensors of two prefixes."""
    return max((a.kv[n] - b.kv[n]).abs().max().item() for n in a.kv)
