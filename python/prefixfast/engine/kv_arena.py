"""The KV arena, one tensor of keys and one of values per layer that hold all prefixes and requests of an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefixfast.attention.plan import Arena, LayerKV
from prefixfast.config import EngineConfig
from prefixfast.config.sites import SITE_NAMES
from prefixfast.engine.arena_sites import ROW_UNIT
from prefixfast.errors import CapacityError, ConfigError
from prefixfast.model.base import Model
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.memory import free_memory, in_large_pages
from prefixfast.model.prefix_shape import by_source, readers

DEFAULT_MAX_MODEL_LEN = 4096
RESERVED_ROWS = 80  # the scheduler keeps a tail and a scratch row
DEFAULT_MAX_BYTES = 8 * 2**30  # on a CPU


def bytes_per_row(model: Model) -> int:
    """Bytes of one arena row in all layers: keys and values of one token."""
    own = [s for s in model.layers if s.source is None]
    return sum(2 * s.num_kv_heads * s.attention_dim for s in own) * model.dtype.itemsize


def cross_rows(num_tokens: int) -> int:
    """Number of arena rows of a request's keys and values of cross-attention.

    Args:
        num_tokens: Number of tokens of the source.
    """
    return -(-num_tokens // ROW_UNIT) * ROW_UNIT


def num_arena_rows(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Number of arena rows that fit the memory.

    At most the rows that all decode rows use at full length, each with a long prefix and, in an encoder-decoder base, a
    long text of its own.

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
    source = 0 if model.seq2seq is None else cross_rows(config.max_num_batched_tokens)
    return min(budget // row, RESERVED_ROWS + config.max_num_seqs * (max_model_len + DEFAULT_MAX_MODEL_LEN + source))


def make_arena(model: Model, arena_rows: int, decode_rows: int, max_len: int) -> Arena:
    """Uninitialized keys and values of every layer that has its own, and an empty slot table.

    Args:
        model: Base model.
        arena_rows: Number of rows of each layer's keys and values.
        decode_rows: Number of rows of the slot table.
        max_len: Number of columns of the slot table.

    Raises:
        CapacityError: If the machine does not have the memory.
        ConfigError: If the rows of an encoder-decoder base differ in width.
    """
    check_widths(model)
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
    return Arena(layers, table, readers(model.layers), encoder_layers(layers, model))


def check_widths(model: Model) -> None:
    """Check that rows of every site fit the same arena tensors.

    Raises:
        ConfigError: If cross-attention has other heads than the decoder's self-attention, or the encoder has rows of
            another width.
    """
    for site, shapes in model.sites.items():
        for i, shape in enumerate(shapes):
            own = model.layers[i % len(model.layers)]
            same = shape.row == own.row if site == "cross" else _width(shape) == _width(own)
            if not same:
                msg = (
                    f"cannot make an engine for this base: expected {SITE_NAMES[site]} of layer {i} with rows of "
                    f"{own.row}, as in the decoder's self-attention, got {shape.row}; the KV arena holds all of them "
                    "in the same tensors"
                )
                raise ConfigError(msg)


def _width(shape: LayerShape) -> int:
    return shape.num_kv_heads * shape.attention_dim


def encoder_layers(layers: Sequence[LayerKV], model: Model) -> list[LayerKV]:
    """Arena tensors of each encoder layer, which are those of the decoder's layers in turn; empty without an encoder.

    Args:
        layers: Keys and values of each decoder layer.
        model: Base model.
    """
    found = []
    for i, shape in enumerate(model.sites.get("enc", ())):
        k, v = (t.view(len(t), shape.num_kv_heads, shape.attention_dim) for t in layers[i % len(layers)])
        found.append((k, v))
    return found


def encoder_folds(model: Model) -> list[int] | None:
    """Fold of each encoder layer, the number of encoder layers before it in the same arena tensors; None without one.

    Args:
        model: Base model.
    """
    shapes = model.sites.get("enc")
    return None if shapes is None else [i // len(model.layers) for i in range(len(shapes))]
