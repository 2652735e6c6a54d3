"""Tile sizes that the planner cuts work into, chosen from `tile_configs` for a device and a model.

Shape letters: BM rows of a query tile (tokens x query heads of a kv head), G queries per kv head, H kv heads.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from prefixfast_kernels.tile_configs import (
    CHIPS,
    DECODE_CONFIGS,
    KERNELS,
    PACKED_CONFIGS,
    DecodeConfig,
    PackedConfig,
)

# Programs of `prefix_decode` that a processor holds: as many as registers and shared memory allow up to head dim 128.
PROGRAMS_PER_PROCESSOR = 2
# Constants of the cost model of decode, estimates that are not measured on a device.
L2_BYTES_PER_SECOND = 5.5e12  # prefixes that several rows read come from the L2 cache
LAUNCH_SECONDS = 2.5e-6  # one more launch in a captured graph
ITEM_START_SECONDS = 1e-6  # time until a work item's first keys arrive


class TileSizes(NamedTuple):
    """Tile sizes of the packed kernels, which the planner cuts work into.

    Attributes:
        tokens: Query tokens of a tile, 0 for tables without tiles.
        keys: Keys of a tile in the backward.
        rows: Prefix rows of a tile in the backward.
        depth: Largest number of blocks that one query sees. At 1 the backward can save a pass over the prefix.
    """

    tokens: int
    keys: int
    rows: int
    depth: int = 2


NO_TILES = TileSizes(0, 0, 0)


class DecodeSizes(NamedTuple):
    """Sizes that the planner cuts decode steps into, and its cost model of reading a block once for a group of rows.

    Attributes:
        users: Largest number of rows in a group's tile, 0 for no work tables.
        fill: Number of work items that fills the device.
        key_bytes: Bytes of the key and value of one row and one kv head.
        part_bytes: Bytes of a partial sum of one row and one kv head, written and read.
        item_bytes: Bytes that could be read in the time that a work item needs to start.
        launch_bytes: Bytes that one kv head could read during the launch that merges partial sums.
    """

    users: int
    fill: int
    key_bytes: int
    part_bytes: int
    item_bytes: int
    launch_bytes: int


NO_WORK = DecodeSizes(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Backend:
    """Kernels that a model runs on.

    Attributes:
        name: ``"auto"`` (the fastest backend that supports a call), ``"triton"``, ``"torch"`` or ``"reference"``.
        sizes: Tile sizes of packed forwards for the Triton kernels.
        decode: Sizes of decode steps for the Triton kernels.
    """

    name: str
    sizes: TileSizes = NO_TILES
    decode: DecodeSizes = NO_WORK


def padded_size(size: int) -> int:
    """Smallest power of two that is at least ``size`` and at least 16, the size of a tile's dimension in registers."""
    return max(16, 1 << (size - 1).bit_length())


def tile_rows(tokens: int, group: int) -> int:
    """BM of a tile of ``tokens`` tokens with ``group`` query heads each: a power of two, at least 16."""
    return padded_size(tokens * group)


def is_interpreted() -> bool:
    """Whether Triton runs in its interpreter (``TRITON_INTERPRET=1`` when it was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=16)
def chip_of(device: torch.device) -> str:
    """Chip whose configurations a device uses.

    Raises:
        ValueError: If there are no configurations for the device.
    """
    if device.type == "cpu" and is_interpreted():
        return "sm90"
    if device.type == "cuda" and torch.version.hip:
        return "gfx942"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = {8: "sm80", 9: "sm90", 10: "sm100"}.get(major)
        if found and (major, minor) not in ((8, 6), (8, 9)):
            return found
    msg = f"the triton backend has tile sizes for {', '.join(CHIPS)}, not for {device}; use backend='torch'"
    raise ValueError(msg)


def packed_config(device: torch.device, head_dim: int, dtype: torch.dtype) -> PackedConfig:
    """Configurations of the packed kernels. Head dims below 64 use those of 64."""
    return PACKED_CONFIGS[chip_of(device), max(64, padded_size(head_dim)), dtype.itemsize]


def decode_config(device: torch.device, head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    """Configurations of `prefix_decode`. Head dims below 64 use those of 64."""
    return DECODE_CONFIGS[chip_of(device), max(64, padded_size(head_dim)), dtype.itemsize]


def tile_sizes(device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> TileSizes:
    """Tile sizes of a model's packed forwards.

    Args:
        device: Device of the kernels.
        dtype: Compute dtype.
        shapes: (queries per kv head, head dim) of every layer. The smallest tile of all layers is used.

    Raises:
        ValueError: If there are no tiles for the device, or if the query heads of a kv head do not fit a tile.
    """
    found = [(packed_config(device, head_dim, dtype), group) for group, head_dim in shapes]
    for config, group in found:
        inner = (c.inner for (kernel, _), c in config.kernels.items() if kernel in KERNELS[2:])
        if group > (least := min(config.bm, *inner)):
            msg = f"{group} query heads of one kv head do not fit a tile of {least} rows; use backend='torch'"
            raise ValueError(msg)
    return TileSizes(
        tokens=min(max(1, config.bm // group) for config, group in found),
        keys=min(config.keys for config, _ in found),
        rows=min(config.rows for config, _ in found),
    )


def num_processors(device: torch.device) -> int:
    """Number of multiprocessors of a device, 16 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def decode_sizes(
    device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], num_kv_heads: int
) -> DecodeSizes:
    """Sizes of a model's decode steps.

    Args:
        device: Device of the kernels.
        dtype: Compute dtype.
        shapes: (queries per kv head, head dim) of every layer. The smallest tile of all layers is used. The last shape
            determines the costs.
        num_kv_heads: Number of kv heads of a layer.

    Raises:
        ValueError: If there are no tiles for the device, or if the query heads of a kv head do not fit a tile.
    """
    found = [(decode_config(device, head_dim, dtype).bm, group) for group, head_dim in shapes]
    for bm, group in found:
        if group > bm:
            msg = f"{group} query heads of one kv head do not fit a decode tile of {bm} rows; use backend='torch'"
            raise ValueError(msg)
    group, head_dim = shapes[-1]
    programs = PROGRAMS_PER_PROCESSOR * num_processors(device)
    return DecodeSizes(
        users=min(bm // group for bm, group in found),
        fill=max(1, programs // num_kv_heads),
        key_bytes=2 * head_dim * dtype.itemsize,
        part_bytes=2 * 4 * group * (head_dim + 2),
        item_bytes=int(ITEM_START_SECONDS * L2_BYTES_PER_SECOND / programs),
        launch_bytes=int(LAUNCH_SECONDS * L2_BYTES_PER_SECOND / num_kv_heads),
    )
