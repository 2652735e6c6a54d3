"""Every variant of the Triton kernels that the launchers can ask for, and its compilation for any supported chip.

No GPU is needed, because Triton's wheel contains the assemblers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prefixfast_kernels.launch import combine_heads
from prefixfast_kernels.prefix_bwd_dq import prefix_bwd_delta, prefix_bwd_dq
from prefixfast_kernels.prefix_bwd_kv import prefix_bwd_block, prefix_bwd_kv, prefix_bwd_sum
from prefixfast_kernels.prefix_decode import decode_combine, prefix_decode
from prefixfast_kernels.prefix_fwd import prefix_fwd
from prefixfast_kernels.softmax_grad import softmax_grad
from prefixfast_kernels.tile_configs import (
    CHIP_INDEPENDENT,
    CHIPS,
    DECODE_CONFIGS,
    PACKED_CONFIGS,
    CompileConfig,
)
from prefixfast_kernels.tile_selection import padded_size, tile_rows

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
FUNCTIONS = {
    f.__name__: f
    for f in (
        prefix_fwd,
        prefix_bwd_dq,
        prefix_bwd_kv,
        prefix_bwd_block,
        prefix_bwd_delta,
        prefix_bwd_sum,
        softmax_grad,
        prefix_decode,
        decode_combine,
    )
}
HEAD_DIMS = (64, 80, 96, 128, 256)
COMMON_HEAD_DIMS = (64, 128)
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
GROUP = 4
PLAIN_FLAGS: dict[str, Any] = {
    "CAUSAL": True,
    "WINDOW": False,
    "SOFTCAP": False,
    "BIAS": False,
    "PREFIX": True,
    "ARENA": False,
    "FUSED": False,
    "GRAD": True,
}
# Flags of each variant that a kernel is compiled for. A kernel takes the flags that it has a parameter for.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"FUSED": True},
    "window and cap": {"WINDOW": True, "SOFTCAP": True},
    "arena": {"ARENA": True},
    "not causal": {"CAUSAL": False},
    "bias": {"BIAS": True, "G": 1},
    "bias, not causal": {"BIAS": True, "G": 1, "CAUSAL": False},
    "bias, arena": {"BIAS": True, "G": 1, "ARENA": True},
    "G = 1": {"G": 1},
    "G = 3": {"G": 3},
    "G = 8": {"G": 8},
    "no gradient": {"GRAD": False, "SOFTCAP": True},
    "fp32 prefix": {"PREFIX_FP32": True},
}
FP32_POINTERS = ("LSE", "DELTA", "PART", "PARTS_K", "PARTS_V", "DPK", "DPV", "LOGITS", "LOSSES", "STAT", "BIAS_TABLE")
PACKED_TABLES = (
    "TILES",
    "SEG",
    "SEG_POS",
    "USE_INDPTR",
    "USE",
    "BLOCK",
    "SLOTS",
    "KEY_TILES",
    "BLOCK_TILES",
    "USER_INDPTR",
    "USER",
    "USER_POS",
    "USER_SLIDES",
)
DECODE_TABLES = ("TABLE", "ROW", "LENS", "WORK", "GROUPED", "PART_INDPTR", "PARTS")


class Kernel(NamedTuple):
    """One kernel to compile.

    Attributes:
        name: Name of the kernel, a key of `FUNCTIONS`.
        chip: Name of the chip, one of `CHIPS`.
        head_dim: Head dim D.
        dtype: Dtype of queries and keys, a key of `BYTES`.
        variant: Name of the variant, a key of `VARIANTS`.
    """

    name: str
    chip: str
    head_dim: int
    dtype: str
    variant: str

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of the variant."""
        return VARIANTS[self.variant]

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return int(self.flags.get("G", GROUP))

    @property
    def config_key(self) -> tuple[str, int, int]:
        """Key in `PACKED_CONFIGS` and `DECODE_CONFIGS`."""
        return self.chip, max(64, padded_size(self.head_dim)), BYTES[self.dtype]

    def compile_config(self) -> CompileConfig:
        """Tile size and compile options that the launcher uses."""
        if self.name in CHIP_INDEPENDENT:
            return CHIP_INDEPENDENT[self.name]
        window, softcap, bias, fused = (bool(self.flags.get(f)) for f in ("WINDOW", "SOFTCAP", "BIAS", "FUSED"))
        if self.name == "prefix_decode":
            return DECODE_CONFIGS[self.config_key].config
        config = PACKED_CONFIGS[self.config_key]
        masked = window or softcap
        return config.compile_config(self.name, self.group, masked=masked, fused=fused, biased=bias)


def _constants(kernel: Kernel) -> dict[str, Any]:
    """Values of the kernel's ``constexpr`` parameters, as the launcher sets them, and of some that it does not have."""
    name, head_dim, group = kernel.name, kernel.head_dim, kernel.group
    config, packed = kernel.compile_config(), PACKED_CONFIGS[kernel.config_key]
    over_queries = name in ("prefix_fwd", "prefix_bwd_dq")
    tokens = (packed.bm if over_queries else config.inner) // group
    keys = {"prefix_bwd_kv": packed.keys, "prefix_bwd_block": packed.rows, "prefix_bwd_sum": packed.rows}
    constants = PLAIN_FLAGS | {
        "HQ": 8 * group,
        "H": 8,
        "G": group,
        "D": head_dim,
        "DP": padded_size(head_dim),
        "TOKENS": tokens,
        "BM": tile_rows(tokens, group),
        "BN": keys.get(name, config.inner),
        "PRECISION": "ieee" if kernel.dtype == "fp32" else "tf32",
        "UP": False,
        **kernel.flags,
    }
    if name == "prefix_bwd_delta":
        constants["BM"] = config.inner // padded_size(head_dim)
    if name == "prefix_decode":
        constants |= {"BM": DECODE_CONFIGS[kernel.config_key].bm, "BH": padded_size(group)}
    if name == "decode_combine":
        constants["BH"] = combine_heads(8 * group, head_dim)
    if name == "softmax_grad":  # BLOCK is a table in the other kernels
        constants["BLOCK"] = config.inner
    return constants


def compile_kernel(kernel: Kernel) -> Any:
    """Compile one kernel as the launcher does."""
    function, constants = FUNCTIONS[kernel.name], _constants(kernel)
    signature = {n: "constexpr" if n in constants else _parameter_type(n, kernel.dtype) for n in function.arg_names}
    if kernel.flags.get("PREFIX_FP32"):
        signature |= {"PK": "*fp32", "PV": "*fp32"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, kind) in enumerate(signature.items())
        if kind.startswith("*") or n.startswith("stride")
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={n: v for n, v in constants.items() if n in signature},
        attrs=aligned,
    )
    options = kernel.compile_config().launch_options()
    return triton.compile(source, target=GPUTarget(*TARGETS[kernel.chip]), options=options)


def _parameter_type(name: str, element: str) -> str:
    """Type of a kernel parameter that is not a ``constexpr``. The dtype of queries and keys is ``element``."""
    if name in (*PACKED_TABLES, *DECODE_TABLES):
        return "*i32"
    if name in FP32_POINTERS:
        return "*fp32"
    if name == "TARGETS":
        return "*i64"
    return {"scale": "fp32", "softcap": "fp32"}.get(name, f"*{element}" if name.isupper() else "i32")


def shipped_kernels(chips: Sequence[str] = CHIPS, *, quick: bool = False) -> Iterator[Kernel]:
    """Every kernel that ships.

    Group sizes other than 4, and fp16 (which has the tiles of bf16), are compiled for head dims 64 and 128 only.

    Args:
        chips: Names of the chips.
        quick: Whether to take only bf16 with head dims 64 and 128, the plain and the fused variant.
    """
    for chip, dtype, head_dim, name, variant in itertools.product(chips, BYTES, HEAD_DIMS, FUNCTIONS, VARIANTS):
        kernel = Kernel(name, chip, head_dim, dtype, variant)
        common = dtype == "bf16" and head_dim in COMMON_HEAD_DIMS and variant in ("plain", "fused")
        if _ships(kernel) and (not quick or common or name == "softmax_grad"):
            yield kernel


def _ships(kernel: Kernel) -> bool:
    """Whether the launcher can ask for the kernel."""
    name, _, head_dim, dtype, variant = kernel
    flags = kernel.flags
    if variant == "fp32 prefix":  # the other kernels cast the prefix before the launch
        return name == "prefix_decode" and dtype == "bf16"
    if name == "decode_combine":
        return variant == "plain" and dtype != "fp16"
    if name == "softmax_grad":  # logits are fp32 and have no head dim
        return dtype == "fp32" and head_dim == 64 and variant in ("plain", "no gradient")
    parameters = set(FUNCTIONS[name].arg_names)
    if variant.startswith("bias"):  # models with a bias have no groups and head dims of a power of two
        if flags.get("ARENA") and name != "prefix_fwd":  # a prefill that continues prompts has no gradient
            return False
        return head_dim in COMMON_HEAD_DIMS and dtype != "fp16" and parameters >= set(flags)
    if variant != "plain" and (variant == "no gradient" or not parameters & set(flags)):
        return False
    if variant == "fused" and head_dim > 128:
        return False
    return (
        (variant == "plain" or dtype != "fp16")
        and (head_dim in COMMON_HEAD_DIMS or (dtype != "fp16" and "G" not in flags))
        and not (dtype == "fp32" and "G" in flags)
    )
