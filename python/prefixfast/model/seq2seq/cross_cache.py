"""`CrossCache`, which keeps a decoder from projecting encoder states that were projected in prefill.

Cross-attention reads its keys and values from the arena then. transformers skips the projections of a cache whose
``is_updated`` says that they are there, and hands its tensors on; the attention function does not look at them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache


class _PassingCache:
    """Cache of self-attention that holds nothing, since its keys and values lie in the arena."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values."""
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """0, since positions come from the plan."""
        return 0


class CrossCache(EncoderDecoderCache):
    """Cache of a decode step.

    Args:
        num_layers: Number of decoder layers.
        row: Keys, and values, of the shape of one encoder token, ``[1, H, 1, D]``.
    """

    def __init__(self, num_layers: int, row: Tensor) -> None:
        self.self_attention_cache = _PassingCache()
        self.cross_attention_cache = SimpleNamespace(layers=[SimpleNamespace(keys=row, values=row)] * num_layers)
        self.is_updated = dict.fromkeys(range(num_layers), True)

    def get_seq_length(self, *_: Any) -> int:
        """0, since positions come from the plan."""
        return 0
