"""Compile the shipped kernels for chips that are not here, and read what they cost: registers, spills, shared memory, tensor-core and copy instructions.

No GPU is needed: Triton's wheel brings the assemblers. ``python -m prefixfast_kernels.testing.compile_report`` prints the table of kernels/resources.md.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prefixfast_kernels.launch import combine_heads
from prefixfast_kernels.prefix_bwd_dq import prefix_bwd_delta, prefix_bwd_dq
from prefixfast_kernels.prefix_bwd_kv import prefix_bwd_block, prefix_bwd_kv, prefix_bwd_sum
from prefixfast_kernels.prefix_decode import decode_combine, prefix_decode
from prefixfast_kernels.prefix_fwd import prefix_fwd
from prefixfast_kernels.softmax_grad import softmax_grad
from prefixfast_kernels.tile_configs import CHIPS, DECODE, EVERYWHERE, KERNELS, TABLE, Compile, padded, rows_of

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
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
DOTS = (*KERNELS, "prefix_decode")  # those that multiply tiles
HEAD_DIMS = (64, 80, 96, 128, 256)
USUAL = (64, 128)
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
GROUP = 4
PLAIN: dict[str, Any] = {
    "CAUSAL": True,
    "WINDOW": False,
    "SOFTCAP": False,
    "PREFIX": True,
    "ARENA": False,
    "FUSED": False,
    "GRAD": True,
}
# What a kernel is compiled for beside the plain case; each flag that it knows of is set.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"FUSED": True},
    "window and cap": {"WINDOW": True, "SOFTCAP": True},
    "arena": {"ARENA": True},
    "not causal": {"CAUSAL": False},
    "G = 1": {"G": 1},
    "G = 3": {"G": 3},
    "G = 8": {"G": 8},
    "no gradient": {"GRAD": False, "SOFTCAP": True},
    "fp32 prefix": {"PREFIX_FP32": True},
}
FP32 = ("LSE", "DELTA", "PART", "PARTS_K", "PARTS_V", "DPK", "DPV", "LOGITS", "LOSSES", "STAT")
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


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs.

    Attributes:
        registers: Of a thread.
        spilled: Bytes (NVIDIA) or registers (AMD) that went to memory.
        shared: Bytes of a program.
        mma: Tensor-core instructions, of which ``wgmma`` are Hopper's warp-group ones.
        wgmma: See ``mma``.
        copies: Asynchronous copies from memory to shared memory.
    """

    registers: int
    spilled: int
    shared: int
    mma: int
    wgmma: int
    copies: int


def how(name: str, chip: str, head_dim: int, dtype: str, variant: str) -> Compile:
    """How the launcher compiles a kernel."""
    if name in EVERYWHERE:
        return EVERYWHERE[name]
    flags = VARIANTS[variant]
    if name == "prefix_decode":
        found = DECODE[chip, max(64, padded(head_dim)), BYTES[dtype]]
        return found.how(flags.get("G", GROUP), masked=bool(flags.get("WINDOW")))
    masked = bool(flags.get("WINDOW") or flags.get("SOFTCAP"))
    return TABLE[chip, max(64, padded(head_dim)), BYTES[dtype]].how(
        name, flags.get("G", GROUP), masked=masked, fused=bool(flags.get("FUSED"))
    )


def build(name: str, chip: str, head_dim: int, dtype: str, variant: str) -> Any:
    """Compile one kernel as the launcher does.

    Args:
        name: One of `FUNCTIONS`.
        chip: One of `CHIPS`.
        head_dim: D.
        dtype: One of `BYTES`.
        variant: One of `VARIANTS`.
    """
    function, entry, compiled = (
        FUNCTIONS[name],
        TABLE[chip, max(64, padded(head_dim)), BYTES[dtype]],
        how(name, chip, head_dim, dtype, variant),
    )
    flags = VARIANTS[variant]
    group = flags.get("G", GROUP)
    over_queries = name in ("prefix_fwd", "prefix_bwd_dq")
    tokens = (entry.bm if over_queries else compiled.inner) // group
    constants: dict[str, Any] = PLAIN | {
        "HQ": 8 * group,
        "H": 8,
        "G": group,
        "D": head_dim,
        "DP": padded(head_dim),
        "TOKENS": tokens,
    }
    constants |= {"BM": compiled.inner // padded(head_dim) if name == "prefix_bwd_delta" else rows_of(tokens, group)}
    constants |= {
        "BN": {"prefix_bwd_kv": entry.keys, "prefix_bwd_block": entry.rows, "prefix_bwd_sum": entry.rows}.get(
            name, compiled.inner
        )
    }
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32", "UP": False, **flags}
    if name == "prefix_decode":
        constants |= {"BM": DECODE[chip, max(64, padded(head_dim)), BYTES[dtype]].bm, "BH": padded(group)}
    if name == "decode_combine":
        constants["BH"] = combine_heads(8 * group, head_dim)
    if name == "softmax_grad":  # elsewhere BLOCK is a table
        constants["BLOCK"] = compiled.inner
    signature = {n: "constexpr" if n in constants else _type(n, dtype) for n in function.arg_names}
    if flags.get("PREFIX_FP32"):
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
    return triton.compile(source, target=GPUTarget(*TARGETS[chip]), options=compiled.options())


def _type(name: str, element: str) -> str:
    if name in (*PACKED_TABLES, *DECODE_TABLES):
        return "*i32"
    if name in FP32:
        return "*fp32"
    if name == "TARGETS":
        return "*i64"
    return {"scale": "fp32", "softcap": "fp32"}.get(name, f"*{element}" if name.isupper() else "i32")


def report(kernel: Any, chip: str) -> Report:
    """Read the costs of a compiled kernel."""
    if chip.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        found = {
            n: int(m[1]) if (m := re.search(rf"\.{n}:\s+(\d+)", text)) else 0
            for n in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        return Report(
            found["vgpr_count"], found["vgpr_spill_count"], kernel.metadata.shared, text.count("v_mfma"), 0, 0
        )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"], encoding="utf8")
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        code = _output(tools / "cuobjdump", "-sass", cubin)
    count = {
        op: len(re.findall(rf"\b{op}", code))
        for op in ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "UTMALDG", "LDL", "STL")
    }
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    mma = count["HGMMA"] + count["HMMA"] + count["UTCHMMA"]
    return Report(
        int(registers[1]),
        4 * count["STL"],
        kernel.metadata.shared,
        mma,
        count["HGMMA"],
        count["LDGSTS"] + count["UTMALDG"],
    )


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False).stdout


def cases(chips: Sequence[str] = CHIPS, *, quick: bool = False) -> Iterator[tuple[str, str, int, str, str]]:
    """(kernel, chip, head dim, dtype, variant) of all that ships; ``quick``: bf16 with head dims 64 and 128, the plain and the fused variant.

    Group sizes other than 4, and fp16 (the tiles of bf16), are compiled for head dims 64 and 128.
    """
    for chip, dtype, head_dim, name, variant in itertools.product(chips, BYTES, HEAD_DIMS, FUNCTIONS, VARIANTS):
        common = name == "softmax_grad" or (dtype == "bf16" and head_dim in USUAL and variant in ("plain", "fused"))
        if _ships(name, head_dim, dtype, variant) and (common or not quick):
            yield name, chip, head_dim, dtype, variant


def _ships(name: str, head_dim: int, dtype: str, variant: str) -> bool:
    names, flags = set(FUNCTIONS[name].arg_names), VARIANTS[variant]
    if variant == "fp32 prefix":  # elsewhere it is cast before the kernel
        return name == "prefix_decode" and dtype == "bf16"
    if name == "decode_combine":
        return variant == "plain" and dtype != "fp16"
    if name == "softmax_grad":  # logits are fp32 and have no head dim
        return dtype == "fp32" and head_dim == 64 and variant in ("plain", "no gradient")
    if variant != "plain" and (variant == "no gradient" or not names & set(flags)):
        return False
    if variant == "fused" and head_dim > 128:
        return False
    return (
        (variant == "plain" or dtype != "fp16")
        and (head_dim in USUAL or (dtype != "fp16" and "G" not in flags))
        and not (dtype == "fp32" and "G" in flags)
    )


def faults(found: Report, name: str, chip: str, head_dim: int, dtype: str, variant: str) -> list[str]:
    """What is wrong with a compiled kernel: spills, too much shared memory, products that miss the tensor cores, loads that are not asynchronous."""
    entry = TABLE[chip, max(64, padded(head_dim)), BYTES[dtype]]
    decode = DECODE[chip, max(64, padded(head_dim)), BYTES[dtype]]
    tall = {"prefix_bwd_kv": entry.keys, "prefix_bwd_block": entry.rows, "prefix_decode": decode.bm}.get(
        name, entry.bm
    ) >= 64
    half = dtype != "fp32" and name in DOTS
    checks = {
        f"{found.spilled} spilled": found.spilled > 0,
        f"{found.shared} bytes of shared memory, the chip has {SHARED_LIMIT[chip]}": found.shared > SHARED_LIMIT[chip],
        "no tensor-core instruction": half and not found.mma,
        "no warp-group product": chip == "sm90" and half and tall and not found.wgmma,
        "no asynchronous copy": not chip.startswith("gfx")
        and name in DOTS
        and how(name, chip, head_dim, dtype, variant).stages > 1
        and not found.copies,
    }
    return [text for text, holds in checks.items() if holds]


def main() -> int:
    """Print the table in Markdown; the exit code is 1 if anything is wrong with a kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="*", default=CHIPS, help=f"by default {', '.join(CHIPS)}")
    parser.add_argument(
        "--quick", action="store_true", help="bf16, head dims 64 and 128, the plain and the fused variant"
    )
    args = parser.parse_args()
    print(
        f"Triton {triton.__version__}\n\n| chip | kernel | D | dtype | variant | registers | spilled | shared KiB | mma (wgmma) | async copies |"
    )
    print("| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    wrong = 0
    for name, chip, head_dim, dtype, variant in cases(args.chips, quick=args.quick):
        r = report(build(name, chip, head_dim, dtype, variant), chip)
        cells = (
            chip,
            name,
            head_dim,
            dtype,
            variant,
            r.registers,
            r.spilled,
            f"{r.shared / 1024:.0f}",
            f"{r.mma} ({r.wgmma})",
            r.copies,
        )
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        for fault in faults(r, name, chip, head_dim, dtype, variant):
            wrong += 1
            print(f"FAULT {name} {chip} D={head_dim} {dtype} {variant}: {fault}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
