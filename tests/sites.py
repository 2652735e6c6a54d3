"""Random prefixes with rows at several sites, and a base model that holds the shapes of its layers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prefixfast import Prefix
from prefixfast.attention.plan import PrefixUse
from prefixfast.attention.seq2seq_plan import seq2seq_training_plan
from prefixfast.config.sites import SITES
from prefixfast.model.dry_run import LayerShape
from prefixfast.prefix.kv import site_prefixes

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


@torch.no_grad()
def packed_logits(model: Any, prefixes: list[Prefix], encoder_ids: torch.Tensor, decoder_ids: torch.Tensor) -> Any:
    """Logits ``[T, V]`` of one request of an encoder-decoder base by one packed forward; prefixes from the left."""
    use = PrefixUse(np.array([0, len(prefixes)], np.int32), np.arange(len(prefixes), dtype=np.int32))
    counts = [np.array([len(ids)], np.int32) for ids in (decoder_ids, encoder_ids)]
    plan = seq2seq_training_plan(*counts, use, site_prefixes(prefixes, model), backend=model.backend)
    return model.forward(plan, decoder_ids, encoder_ids)
