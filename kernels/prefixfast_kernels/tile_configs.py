"""Tile sizes of the Triton kernels, and how each is compiled: one table by chip, kernel and head dim.

Every entry compiles without spills for its chip (tests/kernels/test_resources.py). Which of several good entries is fastest only a device can say.
Shape letters: BM rows of a query tile (tokens x query heads of a kv head), BN keys of a key tile, G queries per kv head, D head dim, H kv heads.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

CHIPS = ("sm80", "sm90", "sm100", "gfx942")
KERNELS = ("prefix_fwd", "prefix_bwd_dq", "prefix_bwd_kv", "prefix_bwd_block")


class Sizes(NamedTuple):
    """What the planner cuts work into; every kernel's tile follows from it.

    Attributes:
        tokens: Query tokens of a tile.
        keys: Keys of a tile in the backward.
        rows: Prefix rows of a tile in the backward.
        depth: Most blocks that one query sees; at 1 the backward can save a pass over the prefix.
    """

    tokens: int
    keys: int
    rows: int
    depth: int = 2


NO_TILES = Sizes(0, 0, 0)


class DecodeSizes(NamedTuple):
    """What the planner cuts decode steps into, and its cost model of reading a block for a group of rows instead of for each (kernels/README.md).

    Attributes:
        users: Most rows of a group's tile; 0 makes no work tables.
        fill: Work items that fill the device.
        key_bytes: Key and value of one row, one kv head.
        part_bytes: A partial sum of one row, one kv head, written and read.
        item_bytes: What could have been read while a work item starts.
        launch_bytes: What one kv head could have read during the launch that merges partial sums.
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
    """Which kernels a model runs on.

    Attributes:
        name: ``"auto"`` (the fastest that serves a call) or ``"triton"``, ``"torch"``, ``"reference"``.
        sizes: What plans cut the work into for the triton kernels.
        decode: The same of decode steps.
    """

    name: str
    sizes: Sizes = NO_TILES
    decode: DecodeSizes = NO_WORK


@dataclass(frozen=True)
class Compile:
    """How one kernel is compiled.

    Attributes:
        inner: The tile size that the planner does not decide: BN of the query-tile kernels, BM of the key-tile kernels.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        registers: Most registers of a thread, None: the compiler decides.
    """

    inner: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch or of ``triton.compile``; fusion is spelt out because its default changes with Triton 3.10."""
        out: dict[str, int | bool] = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return out if self.registers is None else {**out, "maxnreg": self.registers}


# Kernels that move memory, the same on every chip; `inner` is numbers of a tile, nothing (sum), or entries of the vocabulary (softmax_grad).
EVERYWHERE = {
    "prefix_bwd_delta": Compile(2048, 8, 1),
    "prefix_bwd_sum": Compile(0, 8, 1),
    "softmax_grad": Compile(4096, 8, 2),
    "decode_combine": Compile(2048, 4, 2),
}


@dataclass(frozen=True)
class Entry:
    """Tiles for one chip, head dim and element size.

    Attributes:
        bm: Rows of a query tile.
        keys: Keys of a tile in the backward.
        rows: Prefix rows of a tile in the backward.
        kernels: By (kernel, case): ``""``, or ``"masked"`` (window or soft cap) or ``"fused"`` where that case must be compiled differently.
    """

    bm: int
    keys: int
    rows: int
    kernels: dict[tuple[str, str], Compile]

    def how(self, kernel: str, group: int, *, masked: bool = False, fused: bool = False) -> Compile:
        """How a kernel is compiled for a case; dividing rows by a group that is no power of two takes registers, as masks do."""
        case = "fused" if fused else "masked" if masked or group & (group - 1) else ""
        return self.kernels.get((kernel, case), self.kernels[kernel, ""])


Ways = tuple[tuple[int, int, int], ...]


def _entry(bm: int, keys: int, rows: int, fwd: Ways, dq: Ways, kv: Ways, block: Ways) -> Entry:
    """Each kernel: (inner, warps, stages), then that of the masked and of the fused case where they differ."""
    cases = ("", "masked", "fused")
    named = zip(KERNELS, (fwd, dq, kv, block), strict=True)
    return Entry(
        bm,
        keys,
        rows,
        {(name, case): Compile(*way) for name, ways in named for case, way in zip(cases, ways, strict=False)},
    )


# (chip, padded head dim, bytes of an element); see `_entry`. Found by compiling candidates from large to small until nothing spills.
TABLE: dict[tuple[str, int, int], Entry] = {
    ("sm80", 64, 2): _entry(
        128, 64, 64, ((64, 8, 3), (64, 8, 2)), ((64, 8, 3),), ((32, 8, 2), (32, 8, 1)), ((32, 8, 3),)
    ),
    ("sm80", 128, 2): _entry(
        128, 64, 64, ((32, 8, 1),), ((32, 8, 2),), ((32, 8, 2),), ((64, 8, 3), (64, 8, 3), (32, 8, 2))
    ),
    ("sm80", 256, 2): _entry(64, 32, 64, ((32, 8, 2),), ((32, 8, 2),), ((32, 8, 2),), ((64, 8, 2), (64, 8, 3))),
    ("sm90", 64, 2): _entry(128, 64, 64, ((64, 8, 3),), ((64, 8, 3),), ((64, 8, 3), (64, 8, 2)), ((64, 8, 3),)),
    ("sm90", 128, 2): _entry(
        128,
        64,
        64,
        ((64, 8, 3),),
        ((64, 8, 3), (32, 8, 2)),
        ((64, 8, 2), (32, 8, 2)),
        ((64, 8, 3), (64, 8, 3), (32, 8, 2)),
    ),
    ("sm90", 256, 2): _entry(128, 32, 32, ((32, 8, 2),), ((32, 8, 2),), ((32, 8, 2),), ((64, 8, 3), (64, 8, 2))),
    ("sm100", 64, 2): _entry(
        128, 64, 64, ((64, 8, 3),), ((64, 4, 3), (64, 8, 3), (64, 8, 3)), ((32, 8, 3), (64, 8, 2)), ((64, 8, 3),)
    ),
    ("sm100", 128, 2): _entry(
        128, 64, 64, ((32, 8, 2),), ((32, 8, 2),), ((64, 8, 3), (32, 8, 2)), ((64, 4, 3), (64, 8, 3), (64, 8, 3))
    ),
    ("sm100", 256, 2): _entry(64, 32, 64, ((32, 8, 1), (32, 8, 2)), ((64, 8, 1),), ((32, 8, 2),), ((32, 8, 2),)),
    ("gfx942", 64, 2): _entry(
        128, 64, 64, ((64, 8, 3),), ((64, 8, 2), (64, 4, 3)), ((64, 4, 1),), ((64, 4, 2), (64, 4, 1), (64, 4, 2))
    ),
    ("gfx942", 128, 2): _entry(
        128, 64, 64, ((32, 8, 2),), ((32, 4, 3),), ((32, 4, 2), (32, 4, 1)), ((32, 4, 3), (32, 4, 2), (32, 4, 2))
    ),
    ("gfx942", 256, 2): _entry(64, 64, 64, ((32, 8, 2),), ((32, 4, 1),), ((16, 4, 1),), ((16, 4, 2),)),
    ("sm80", 64, 4): _entry(32, 32, 32, ((16, 4, 2),), ((16, 4, 2), (16, 16, 2)), ((16, 8, 2),), ((16, 4, 2),)),
    ("sm80", 128, 4): _entry(
        16, 16, 16, ((16, 8, 2), (16, 4, 2)), ((16, 8, 2), (16, 8, 1)), ((16, 8, 1), (16, 16, 1)), ((16, 4, 2),)
    ),
    ("sm80", 256, 4): _entry(
        16, 16, 16, ((16, 8, 2), (16, 4, 2)), ((16, 4, 2),), ((16, 8, 2),), ((16, 4, 2), (16, 16, 1))
    ),
    ("sm90", 64, 4): _entry(
        32, 32, 32, ((32, 4, 2),), ((32, 8, 2), (32, 4, 2), (32, 4, 2)), ((16, 4, 2), (16, 8, 2)), ((16, 4, 2),)
    ),
    ("sm90", 128, 4): _entry(32, 16, 16, ((16, 8, 2),), ((16, 8, 2), (16, 4, 2)), ((16, 4, 2),), ((16, 8, 2),)),
    ("sm90", 256, 4): _entry(16, 16, 16, ((16, 8, 2),), ((16, 8, 2),), ((16, 8, 3), (16, 8, 1)), ((16, 8, 2),)),
    ("sm100", 64, 4): _entry(
        32, 32, 32, ((32, 4, 2),), ((32, 8, 2), (32, 8, 2), (32, 4, 2)), ((16, 4, 2),), ((16, 4, 2),)
    ),
    ("sm100", 128, 4): _entry(32, 16, 16, ((16, 8, 2),), ((16, 8, 2),), ((16, 4, 2),), ((16, 4, 2), (16, 8, 2))),
    ("sm100", 256, 4): _entry(16, 16, 16, ((16, 8, 2),), ((16, 8, 2),), ((16, 8, 1), (16, 8, 3)), ((16, 8, 2),)),
    ("gfx942", 64, 4): _entry(32, 32, 32, ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),)),
    ("gfx942", 128, 4): _entry(32, 16, 16, ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),)),
    ("gfx942", 256, 4): _entry(16, 16, 16, ((16, 4, 2),), ((16, 4, 1),), ((16, 4, 2),), ((16, 4, 2),)),
}


@dataclass(frozen=True)
class DecodeEntry:
    """How `prefix_decode` is compiled for one chip, head dim and element size.

    Attributes:
        bm: Rows of a group's tile (rows of the step x query heads of a kv head).
        ways: The plain case, and the masked one (window or soft cap, or a group that is no power of two) where it differs.
    """

    bm: int
    ways: tuple[Compile, ...]

    def how(self, group: int, *, masked: bool = False) -> Compile:
        """How the kernel is compiled for a case."""
        return self.ways[-1 if masked or group & (group - 1) else 0]


def _decode(bm: int, *ways: tuple[int, int, int]) -> DecodeEntry:
    return DecodeEntry(bm, tuple(Compile(*way) for way in ways))


# (chip, padded head dim, bytes of an element): rows of a group's tile, then (keys of a tile, warps, stages). Found as those above.
DECODE: dict[tuple[str, int, int], DecodeEntry] = {
    ("sm80", 64, 2): _decode(64, (32, 4, 3)),
    ("sm80", 128, 2): _decode(64, (32, 4, 3)),
    ("sm80", 256, 2): _decode(64, (32, 8, 2)),
    ("sm90", 64, 2): _decode(64, (64, 4, 3)),
    ("sm90", 128, 2): _decode(64, (64, 4, 3)),
    ("sm90", 256, 2): _decode(64, (32, 8, 2)),
    ("sm100", 64, 2): _decode(64, (64, 4, 3)),
    ("sm100", 128, 2): _decode(64, (64, 4, 3)),
    ("sm100", 256, 2): _decode(32, (32, 4, 2)),
    ("gfx942", 64, 2): _decode(64, (64, 4, 2)),
    ("gfx942", 128, 2): _decode(64, (32, 4, 2)),
    ("gfx942", 256, 2): _decode(32, (32, 4, 2)),
    ("sm80", 64, 4): _decode(32, (32, 4, 2)),
    ("sm80", 128, 4): _decode(16, (32, 8, 2)),
    ("sm80", 256, 4): _decode(16, (16, 8, 2)),
    ("sm90", 64, 4): _decode(32, (32, 4, 2)),
    ("sm90", 128, 4): _decode(16, (32, 8, 2)),
    ("sm90", 256, 4): _decode(16, (32, 8, 2)),
    ("sm100", 64, 4): _decode(32, (16, 4, 2)),
    ("sm100", 128, 4): _decode(16, (32, 8, 2)),
    ("sm100", 256, 4): _decode(16, (32, 8, 2)),
    ("gfx942", 64, 4): _decode(32, (32, 4, 2)),
    ("gfx942", 128, 4): _decode(16, (16, 8, 2)),
    ("gfx942", 256, 4): _decode(16, (16, 8, 1)),
}
RESIDENT = (
    2  # programs of `prefix_decode` on a processor: what its registers and shared memory allow up to head dim 128
)
L2_BYTES = 5.5e12  # a second; prefixes that several rows read come from there
LAUNCH = 2.5e-6  # seconds of one more launch in a captured graph
START = 1e-6  # seconds until a work item's first keys arrive


def padded(head_dim: int) -> int:
    """The head dim as the kernels hold it: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rows_of(tokens: int, group: int) -> int:
    """BM: rows of a tile of ``tokens`` tokens with ``group`` query heads each, a power of two, at least 16."""
    return padded(tokens * group)


def interpreted() -> bool:
    """Whether Triton runs in its interpreter (``TRITON_INTERPRET=1`` when it was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=16)
def chip(device: torch.device) -> str:
    """The chip whose entries a device uses.

    Raises:
        ValueError: For a device that the table does not have.
    """
    if device.type == "cpu" and interpreted():
        return "sm90"
    if device.type == "cuda" and torch.version.hip:
        return "gfx942"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = {8: "sm80", 9: "sm90", 10: "sm100"}.get(major)
        if found and (major, minor) not in ((8, 6), (8, 9)):
            return found
    msg = f"the triton backend has tiles for {', '.join(CHIPS)}, not for {device}; use backend='torch'"
    raise ValueError(msg)


def entry(device: torch.device, head_dim: int, dtype: torch.dtype) -> Entry:
    """The table's entry; small head dims use that of 64."""
    return TABLE[chip(device), max(64, padded(head_dim)), dtype.itemsize]


def sizes(device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> Sizes:
    """What the planner cuts work into for a model.

    Args:
        device: Where the kernels run.
        dtype: Compute dtype.
        shapes: (queries per kv head, head dim) of every layer; the smallest tile fits all of them.
    """
    found = [(entry(device, head_dim, dtype), group) for group, head_dim in shapes]
    for e, group in found:
        if group > (least := min(e.bm, *(how.inner for (name, _), how in e.kernels.items() if name in KERNELS[2:]))):
            msg = f"{group} query heads of one kv head do not fit a tile of {least} rows; use backend='torch'"
            raise ValueError(msg)
    return Sizes(min(max(1, e.bm // g) for e, g in found), min(e.keys for e, _ in found), min(e.rows for e, _ in found))


def decode_entry(device: torch.device, head_dim: int, dtype: torch.dtype) -> DecodeEntry:
    """The entry of `prefix_decode`; small head dims use that of 64."""
    return DECODE[chip(device), max(64, padded(head_dim)), dtype.itemsize]


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 16 stand for it in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def decode_sizes(
    device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], num_kv_heads: int
) -> DecodeSizes:
    """What the planner cuts a model's decode steps into.

    Args:
        device: Where the kernels run.
        dtype: Compute dtype.
        shapes: (queries per kv head, head dim) of every layer; the smallest tile fits all of them, the last shape sets the costs.
        num_kv_heads: Of a layer.
    """
    found = [(decode_entry(device, head_dim, dtype).bm, group) for group, head_dim in shapes]
    for bm, group in found:
        if group > bm:
            msg = f"{group} query heads of one kv head do not fit a decode tile of {bm} rows; use backend='torch'"
            raise ValueError(msg)
    group, head_dim = shapes[-1]
    slots = RESIDENT * processors(device)
    return DecodeSizes(
        users=min(bm // group for bm, group in found),
        fill=max(1, slots // num_kv_heads),
        key_bytes=2 * head_dim * dtype.itemsize,
        part_bytes=2 * 4 * group * (head_dim + 2),
        item_bytes=int(START * L2_BYTES / slots),
        launch_bytes=int(LAUNCH * L2_BYTES / num_kv_heads),
    )
