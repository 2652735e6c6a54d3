"""The engine's memory: how many rows of keys and values there are, and the tensors that hold them."""

from __future__ import annotations

import torch

from prefixfast.attention.plan import Arena
from prefixfast.config import EngineConfig
from prefixfast.errors import CapacityError
from prefixfast.model.base import Model
from prefixfast.model.memory import free_memory, in_large_pages

LONGEST_BY_DEFAULT = 4096
RESERVED_ROWS = 80  # the scheduler keeps a tail and a scratch row
MOST_BY_DEFAULT = 8 * 2**30


def bytes_of_row(model: Model) -> int:
    """Bytes that one token takes in all layers."""
    return sum(2 * s.num_kv_heads * s.head_dim for s in model.layers) * model.dtype.itemsize


def choose_rows(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Rows that the memory allows, at most what all decode rows can use at full length and with a long prefix of their own.

    Raises:
        CapacityError: If the memory is too small for anything.
    """
    row = bytes_of_row(model)
    share = int(free_memory(model.device) * config.gpu_memory_utilization)
    budget = config.kv_cache_memory or (share if model.device.type == "cuda" else min(share, MOST_BY_DEFAULT))
    if budget // row < RESERVED_ROWS + 16:
        msg = f"kv_cache_memory: {budget} bytes hold {budget // row} rows of {row} bytes, at least {RESERVED_ROWS + 16} are needed"
        raise CapacityError(msg)
    return min(budget // row, RESERVED_ROWS + config.max_num_seqs * (max_model_len + LONGEST_BY_DEFAULT))


def make_arena(model: Model, arena_rows: int, decode_rows: int, longest: int) -> Arena:
    """Uninitialized keys and values of every layer, and an empty slot table."""

    def empty(heads: int, dim: int) -> torch.Tensor:
        return in_large_pages(torch.empty(arena_rows, heads, dim, dtype=model.dtype, device=model.device))

    layers = [(empty(s.num_kv_heads, s.head_dim), empty(s.num_kv_heads, s.head_dim)) for s in model.layers]
    return Arena(layers, torch.zeros(decode_rows, longest, dtype=torch.int32, device=model.device))
