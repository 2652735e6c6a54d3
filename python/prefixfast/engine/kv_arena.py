"""The KV arena, one tensor of keys and one of values per layer that hold all prefixes and requests of an engine."""

from __future__ import annotations

import torch

from prefixfast.attention.plan import Arena
from prefixfast.config import EngineConfig
from prefixfast.errors import CapacityError
from prefixfast.model.base import Model
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.memory import free_memory, in_large_pages
from prefixfast.model.prefix_shape import by_source, readers

DEFAULT_MAX_MODEL_LEN = 4096
RESERVED_ROWS = 80  # the scheduler keeps a tail and a scratch row
DEFAULT_MAX_BYTES = 8 * 2**30  # on a CPU


def bytes_per_row(model: Model) -> int:
    """Bytes of one token's keys and values in all layers."""
    own = [s for s in model.layers if s.source is None]
    return sum(2 * s.num_kv_heads * s.attention_dim for s in own) * model.dtype.itemsize


def num_arena_rows(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Number of arena rows that fit the memory.

    At most the rows that all decode rows use at full length, each with a long prefix of its own.

    Args:
        model: Base model.
        config: Options of the engine.
        max_model_len: Largest number of prompt and generated tokens of a request.

    Raises:
        CapacityError: If the memory is too small for any request.
    """
    row = bytes_per_row(model)
    share = int(free_memory(model.device) * config.gpu_memory_utilization)
    budget = config.kv_cache_memory or (share if model.device.type == "cuda" else min(share, DEFAULT_MAX_BYTES))
    if budget // row < RESERVED_ROWS + 16:
        msg = (
            f"the KV cache of {budget} bytes holds {budget // row} rows of {row} bytes, expected at least "
            f"{RESERVED_ROWS + 16} rows; raise kv_cache_memory, or gpu_memory_utilization where kv_cache_memory is None"
        )
        raise CapacityError(msg)
    return min(budget // row, RESERVED_ROWS + config.max_num_seqs * (max_model_len + DEFAULT_MAX_MODEL_LEN))


def make_arena(model: Model, arena_rows: int, decode_rows: int, max_len: int) -> Arena:
    """Uninitialized keys and values of every layer that has its own, and an empty slot table.

    Args:
        model: Base model.
        arena_rows: Number of rows of each layer's keys and values.
        decode_rows: Number of rows of the slot table.
        max_len: Number of columns of the slot table.

    Raises:
        CapacityError: If the machine does not have the memory.
    """
    try:
        return _allocated(model, arena_rows, decode_rows, max_len)
    except RuntimeError as e:  # torch's error of the CPU's allocator, and the base class of that of a GPU
        msg = (
            f"the KV cache of {arena_rows} rows of {bytes_per_row(model)} bytes and the slot table of "
            f"{decode_rows} times {max_len} numbers do not fit the memory; lower kv_cache_memory, max_num_seqs or "
            "max_model_len"
        )
        raise CapacityError(msg) from e


def _allocated(model: Model, arena_rows: int, decode_rows: int, max_len: int) -> Arena:
    def empty(s: LayerShape) -> torch.Tensor:
        rows = arena_rows if s.source is None else 0
        shape = (rows, s.num_kv_heads, s.attention_dim)
        return in_large_pages(torch.empty(shape, dtype=model.dtype, device=model.device))

    layers = by_source(model.layers, [(empty(s), empty(s)) for s in model.layers])
    table = torch.zeros(decode_rows, max_len, dtype=torch.int32, device=model.device)
    return Arena(layers, table, readers(model.layers))
