"""Tile sizes and compile options of the Triton kernels by chip, head dim and element size.

Every entry compiles without spills for its chip (tests/kernels/test_resources.py). Which of several entries without
spills is fastest can only be measured on a device.
Shape letters: BM rows of a query tile (tokens x query heads of a kv head), BN keys of a key tile, G queries per kv
head, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

CHIPS = ("sm80", "sm90", "sm100", "gfx942")
KERNELS = ("prefix_fwd", "prefix_bwd_dq", "prefix_bwd_kv", "prefix_bwd_block")
MAX_BIASED_HEAD_DIM = 128  # the position bias is compiled for powers of two up to this one, the head dims of T5s


@dataclass(frozen=True)
class CompileConfig:
    """Tile size and compile options of one kernel.

    Attributes:
        inner: Tile size that the planner does not decide: BN of the kernels over query tiles, BM of the kernels over
            key tiles.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    inner: int
    warps: int
    stages: int

    def launch_options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch or of ``triton.compile``."""
        # Fusion is set explicitly, because its default changes with Triton 3.10.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Kernels that only move memory have one configuration for all chips. Their `inner` is the number of elements of a tile,
# unused by prefix_bwd_sum, and the number of vocabulary entries of a tile in softmax_grad.
CHIP_INDEPENDENT = {
    "prefix_bwd_delta": CompileConfig(2048, 8, 1),
    "prefix_bwd_sum": CompileConfig(0, 8, 1),
    "softmax_grad": CompileConfig(4096, 8, 2),
    "decode_combine": CompileConfig(2048, 4, 2),
}


@dataclass(frozen=True)
class PackedConfig:
    """Configurations of the packed kernels for one chip, head dim and element size.

    Attributes:
        bm: Rows of a query tile.
        keys: Keys of a tile in the backward.
        rows: Prefix rows of a tile in the backward.
        kernels: Configurations by (kernel, case). The case is ``""``, or ``"masked"`` (window or soft cap), ``"fused"``
            or ``"biased"`` (position bias) if that case needs a configuration of its own.
    """

    bm: int
    keys: int
    rows: int
    kernels: dict[tuple[str, str], CompileConfig]

    def compile_config(
        self, kernel: str, group: int, *, masked: bool = False, fused: bool = False, biased: bool = False
    ) -> CompileConfig:
        """Configuration of a kernel for one case.

        Args:
            kernel: Name of the kernel, one of `KERNELS`.
            group: Query heads of a kv head. A group that is no power of two counts as masked, because the division of
                rows by it takes registers, as masks do.
            masked: Whether there is a window or a soft cap.
            fused: Whether `prefix_bwd_block` computes the prefix part of dQ.
            biased: Whether there is a position bias. Without a configuration of its own, it counts as masked.
        """
        case = "fused" if fused else "masked" if masked or biased or group & (group - 1) else ""
        config = self.kernels.get((kernel, case), self.kernels[kernel, ""])
        return self.kernels.get((kernel, "biased"), config) if biased else config


Case = tuple[int, int, int]  # inner, warps, stages
Cases = tuple[Case, ...]  # the plain, the masked and the fused case


def _packed(
    tile: tuple[int, int, int], fwd: Cases, dq: Cases, kv: Cases, block: Cases, biased: dict[str, Case] | None = None
) -> PackedConfig:
    """Configurations of all packed kernels, without masked and fused cases that equal the plain one.

    Args:
        tile: Rows of a query tile, keys of a tile and prefix rows of a tile in the backward.
        fwd: Cases of `prefix_fwd`.
        dq: Cases of `prefix_bwd_dq`.
        kv: Cases of `prefix_bwd_kv`.
        block: Cases of `prefix_bwd_block`.
        biased: Biased cases by kernel, for the kernels that spill with a position bias in the masked case.
    """
    names = ("", "masked", "fused")
    by_kernel = zip(KERNELS, (fwd, dq, kv, block), strict=True)
    kernels = {
        (kernel, name): CompileConfig(*case)
        for kernel, cases in by_kernel
        for name, case in zip(names, cases, strict=False)
    }
    kernels |= {(kernel, "biased"): CompileConfig(*case) for kernel, case in (biased or {}).items()}
    return PackedConfig(*tile, kernels)


# Keys: chip, padded head dim, bytes of an element. Candidates were compiled from large to small until nothing spilled.
PACKED_CONFIGS: dict[tuple[str, int, int], PackedConfig] = {
    ("sm80", 64, 2): _packed(
        (128, 64, 64),
        ((64, 8, 3), (64, 8, 2)),
        ((64, 8, 3),),
        ((32, 8, 2), (32, 8, 1)),
        ((32, 8, 3),),
        biased={"prefix_bwd_dq": (64, 8, 2)},
    ),
    ("sm80", 128, 2): _packed(
        (128, 64, 64),
        ((32, 8, 1),),
        ((32, 8, 2),),
        ((32, 8, 2),),
        ((64, 8, 3), (64, 8, 3), (32, 8, 2)),
        biased={"prefix_bwd_dq": (16, 8, 2)},
    ),
    ("sm80", 256, 2): _packed((64, 32, 64), ((32, 8, 2),), ((32, 8, 2),), ((32, 8, 2),), ((64, 8, 2), (64, 8, 3))),
    ("sm90", 64, 2): _packed((128, 64, 64), ((64, 8, 3),), ((64, 8, 3),), ((64, 8, 3), (64, 8, 2)), ((64, 8, 3),)),
    ("sm90", 128, 2): _packed(
        (128, 64, 64),
        ((64, 8, 3),),
        ((64, 8, 3), (32, 8, 2)),
        ((64, 8, 2), (32, 8, 2)),
        ((64, 8, 3), (64, 8, 3), (32, 8, 2)),
        biased={"prefix_fwd": (32, 8, 3)},
    ),
    ("sm90", 256, 2): _packed((128, 32, 32), ((32, 8, 2),), ((32, 8, 2),), ((32, 8, 2),), ((64, 8, 3), (64, 8, 2))),
    ("sm100", 64, 2): _packed(
        (128, 64, 64),
        ((64, 8, 3),),
        ((64, 4, 3), (64, 8, 3), (64, 8, 3)),
        ((32, 8, 3), (64, 8, 2)),
        ((64, 8, 3),),
        biased={"prefix_fwd": (64, 8, 2), "prefix_bwd_dq": (32, 8, 3)},
    ),
    ("sm100", 128, 2): _packed(
        (128, 64, 64), ((32, 8, 2),), ((32, 8, 2),), ((64, 8, 3), (32, 8, 2)), ((64, 4, 3), (64, 8, 3), (64, 8, 3))
    ),
    ("sm100", 256, 2): _packed((64, 32, 64), ((32, 8, 1), (32, 8, 2)), ((64, 8, 1),), ((32, 8, 2),), ((32, 8, 2),)),
    ("gfx942", 64, 2): _packed(
        (128, 64, 64),
        ((64, 8, 3),),
        ((64, 8, 2), (64, 4, 3)),
        ((64, 4, 1),),
        ((64, 4, 2), (64, 4, 1), (64, 4, 2)),
        biased={"prefix_fwd": (64, 8, 2)},
    ),
    ("gfx942", 128, 2): _packed(
        (128, 64, 64), ((32, 8, 2),), ((32, 4, 3),), ((32, 4, 2), (32, 4, 1)), ((32, 4, 3), (32, 4, 2), (32, 4, 2))
    ),
    ("gfx942", 256, 2): _packed((64, 64, 64), ((32, 8, 2),), ((32, 4, 1),), ((16, 4, 1),), ((16, 4, 2),)),
    ("sm80", 64, 4): _packed(
        (32, 32, 32),
        ((16, 4, 2),),
        ((16, 4, 2), (16, 16, 2)),
        ((16, 8, 2),),
        ((16, 4, 2),),
        biased={"prefix_fwd": (16, 16, 2)},
    ),
    ("sm80", 128, 4): _packed(
        (16, 16, 16), ((16, 8, 2), (16, 4, 2)), ((16, 8, 2), (16, 8, 1)), ((16, 8, 1), (16, 16, 1)), ((16, 4, 2),)
    ),
    ("sm80", 256, 4): _packed(
        (16, 16, 16), ((16, 8, 2), (16, 4, 2)), ((16, 4, 2),), ((16, 8, 2),), ((16, 4, 2), (16, 16, 1))
    ),
    ("sm90", 64, 4): _packed(
        (32, 32, 32), ((32, 4, 2),), ((32, 8, 2), (32, 4, 2), (32, 4, 2)), ((16, 4, 2), (16, 8, 2)), ((16, 4, 2),)
    ),
    ("sm90", 128, 4): _packed(
        (32, 16, 16),
        ((16, 8, 2),),
        ((16, 8, 2), (16, 4, 2)),
        ((16, 4, 2),),
        ((16, 8, 2),),
        biased={"prefix_bwd_dq": (16, 8, 2)},
    ),
    ("sm90", 256, 4): _packed((16, 16, 16), ((16, 8, 2),), ((16, 8, 2),), ((16, 8, 3), (16, 8, 1)), ((16, 8, 2),)),
    ("sm100", 64, 4): _packed(
        (32, 32, 32), ((32, 4, 2),), ((32, 8, 2), (32, 8, 2), (32, 4, 2)), ((16, 4, 2),), ((16, 4, 2),)
    ),
    ("sm100", 128, 4): _packed(
        (32, 16, 16),
        ((16, 8, 2),),
        ((16, 8, 2),),
        ((16, 4, 2),),
        ((16, 4, 2), (16, 8, 2)),
        biased={"prefix_fwd": (32, 16, 2)},
    ),
    ("sm100", 256, 4): _packed((16, 16, 16), ((16, 8, 2),), ((16, 8, 2),), ((16, 8, 1), (16, 8, 3)), ((16, 8, 2),)),
    ("gfx942", 64, 4): _packed((32, 32, 32), ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),)),
    ("gfx942", 128, 4): _packed((32, 16, 16), ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),), ((16, 4, 2),)),
    ("gfx942", 256, 4): _packed((16, 16, 16), ((16, 4, 2),), ((16, 4, 1),), ((16, 4, 2),), ((16, 4, 2),)),
}


@dataclass(frozen=True)
class DecodeConfig:
    """Configuration of `prefix_decode` for one chip, head dim and element size, with and without masks and a bias.

    Attributes:
        bm: Rows of a group's tile (rows of the step x query heads of a kv head).
        config: Keys of a tile, and compile options.
    """

    bm: int
    config: CompileConfig


def _decode(bm: int, config: Case) -> DecodeConfig:
    return DecodeConfig(bm, CompileConfig(*config))


# Keys: chip, padded head dim, bytes of an element. Values: rows of a group's tile, (keys of a tile, warps, stages).
# Candidates were compiled from large to small until nothing spilled.
DECODE_CONFIGS: dict[tuple[str, int, int], DecodeConfig] = {
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
