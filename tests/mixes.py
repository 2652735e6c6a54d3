"""Random prefixes and requests for a tiny base."""

import numpy as np
import torch

import tiny
from prefixfast import Prefix

REQUESTS = 24


def prefixes_of(base, seed: int) -> list[Prefix]:
    """Twelve random prefixes that differ in length, layers, pos_start and window."""
    layers, heads = tiny.shapes(base)
    dim = getattr(base.config, "head_dim", None) or base.config.hidden_size // base.config.num_attention_heads
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(12):
        length = 1 + (5 * i) % 17
        own = (0, layers - 1) if i % 5 == 3 else range(layers)  # some prefixes lie in the first and last layer only
        kv = {f"self.{n}.{x}": torch.randn(length, heads, dim, generator=g) * 0.7 for n in own for x in "kv"}
        out.append(Prefix(kv, pos_start=length if i % 3 else 0, window="slide" if i % 2 else "always"))
    return out


def requests(base, seed: int):
    """Random prompts with compositions of up to three prefixes and one to three beams."""
    g = np.random.default_rng(seed)
    own = prefixes_of(base, seed)
    chosen = [[own[j] for j in g.choice(12, int(g.integers(0, 4)), replace=False)] for _ in range(REQUESTS)]
    batch = [
        {
            "input_ids": g.integers(3, tiny.VOCAB, int(g.integers(1, 20))).tolist(),
            "params": {"num_beams": int(g.integers(1, 4)), "max_new_tokens": int(g.integers(1, 9))},
        }
        for _ in range(REQUESTS)
    ]
    return batch, chosen
