"""Random prefixes with rows at several sites, and a base model that holds the shapes of its layers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from prefixfast import Prefix
from prefixfast.config.sites import SITES
from prefixfast.model.dry_run import LayerShape

HEADS = {"enc": (3, 4), "self": (2, 6), "cross": (2, 6)}
DEPTH = {"enc": 3, "self": 2, "cross": 2}


def make_prefix(lengths: dict[str, int], seed: int = 0, **how: Any) -> Prefix:
    """A random prefix with rows at some sites."""
    g = torch.Generator().manual_seed(seed)
    kv = {
        f"{site}.{i}.{x}": torch.randn(rows, *HEADS[site], generator=g)
        for site, rows in lengths.items()
        for i in range(DEPTH[site])
        for x in "kv"
    }
    return Prefix(kv, **{"pos_start": lengths.get("self", 0), **how})


def shape(heads: int, dim: int) -> LayerShape:
    return LayerShape(num_heads=heads, num_kv_heads=heads, head_dim=dim, value_dim=dim)


@dataclass
class FakeModel:
    """The attributes of a base model that the tables of prefixes read."""

    sites: dict[str, list[LayerShape]] = field(
        default_factory=lambda: {site: [shape(*HEADS[site])] * DEPTH[site] for site in SITES}
    )
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
