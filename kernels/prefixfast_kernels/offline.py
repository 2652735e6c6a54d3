"""Compile the shipped kernels for chips that are not here, and read what they cost: registers, spills, shared memory, tensor-core and copy instructions.

No GPU is needed: Triton's wheel brings the assemblers. ``python -m prefixfast_kernels.offline`` prints the table of kernels/resources.md.
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

from prefixfast_kernels.prefix_bwd_dq import prefix_bwd_dq
from prefixfast_kernels.prefix_bwd_kv import prefix_bwd_block, prefix_bwd_kv
from prefixfast_kernels.prefix_fwd import prefix_fwd
from prefixfast_kernels.tiles import CHIPS, KERNELS, TABLE, padded, rows_of

TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "sm100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
FUNCTIONS = {f.__name__: f for f in (prefix_fwd, prefix_bwd_dq, prefix_bwd_kv, prefix_bwd_block)}
HEAD_DIMS = (64, 80, 96, 128, 256)
PLAIN: dict[str, Any] = {"CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "PREFIX": True, "ARENA": False, "FUSED": False}
# What a kernel is compiled for beside the plain case; each flag that it knows of is set.
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "fused": {"FUSED": True},
    "window and cap": {"WINDOW": True, "SOFTCAP": True},
    "arena": {"ARENA": True},
    "not causal": {"CAUSAL": False},
}
FP32 = ("LSE", "DELTA", "PART", "PARTS_K", "PARTS_V", "DPK", "DPV")
TABLES = ("TILES", "SEG", "SEG_POS", "USE_INDPTR", "USE", "BLOCK", "SLOTS", "KEY_TILES", "BLOCK_TILES", "USER_INDPTR", "USER", "USER_POS", "USER_SLIDES")
NAMES = {2: "bf16", 4: "fp32"}


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


def build(name: str, chip: str, head_dim: int, width: int, *, group: int = 4, **flags: bool) -> Any:
    """Compile one kernel from the tile table.

    Args:
        name: One of `KERNELS`.
        chip: One of `CHIPS`.
        head_dim: D.
        width: Bytes of an element.
        group: Queries per kv head.
        flags: Constants that differ from `PLAIN`.
    """
    function, entry = FUNCTIONS[name], TABLE[chip, max(64, padded(head_dim)), width]
    how = entry.how(name, masked=bool(flags.get("WINDOW") or flags.get("SOFTCAP")), fused=bool(flags.get("FUSED")))
    over_queries = name in ("prefix_fwd", "prefix_bwd_dq")
    tokens = (entry.bm if over_queries else how.inner) // group
    keys = how.inner if over_queries else entry.keys if name == "prefix_bwd_kv" else entry.rows
    constants: dict[str, Any] = PLAIN | {
        "HQ": 8 * group,
        "H": 8,
        "G": group,
        "D": head_dim,
        "DP": padded(head_dim),
        "TOKENS": tokens,
        "BM": rows_of(tokens, group),
    }
    constants |= {"BN": keys, "PRECISION": "ieee" if width == 4 else "tf32", "UP": False, **flags}
    signature = {n: "constexpr" if n in constants else _type(n, NAMES[width]) for n in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (n, kind) in enumerate(signature.items()) if kind.startswith("*") or n.startswith("stride")}
    source = ASTSource(fn=function, signature=signature, constexprs={n: v for n, v in constants.items() if n in signature}, attrs=aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[chip]), options=how.options())


def _type(name: str, element: str) -> str:
    if name in TABLES:
        return "*i32"
    if name in FP32:
        return "*fp32"
    return {"scale": "fp32", "softcap": "fp32"}.get(name, f"*{element}" if name.isupper() else "i32")


def report(kernel: Any, chip: str) -> Report:
    """Read the costs of a compiled kernel."""
    if chip.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        found = {n: int(m[1]) if (m := re.search(rf"\.{n}:\s+(\d+)", text)) else 0 for n in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
        return Report(found["vgpr_count"], found["vgpr_spill_count"], kernel.metadata.shared, text.count("v_mfma"), 0, 0)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"], encoding="utf8")
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        code = _output(tools / "cuobjdump", "-sass", cubin)
    count = {op: len(re.findall(rf"\b{op}", code)) for op in ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "UTMALDG", "LDL", "STL")}
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    mma = count["HGMMA"] + count["HMMA"] + count["UTCHMMA"]
    return Report(int(registers[1]), 4 * count["STL"], kernel.metadata.shared, mma, count["HGMMA"], count["LDGSTS"] + count["UTMALDG"])


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False).stdout


def cases(chips: Sequence[str] = CHIPS, *, quick: bool = False) -> Iterator[tuple[str, str, int, int, str]]:
    """(kernel, chip, head dim, bytes, variant) of all that ships; ``quick``: bf16 with head dims 64 and 128, the plain and the fused variant."""
    for chip, width, head_dim, name in itertools.product(chips, (2,) if quick else (2, 4), (64, 128) if quick else HEAD_DIMS, KERNELS):
        for variant, flags in VARIANTS.items():
            if not flags or (set(flags) & set(FUNCTIONS[name].arg_names) and (variant == "fused" or not quick)):
                yield name, chip, head_dim, width, variant


def faults(found: Report, name: str, chip: str, head_dim: int, width: int, variant: str) -> list[str]:
    """What is wrong with a compiled kernel: spills, too much shared memory, products that miss the tensor cores, loads that are not asynchronous."""
    entry, flags = TABLE[chip, max(64, padded(head_dim)), width], VARIANTS[variant]
    how = entry.how(name, masked=bool(flags.get("WINDOW")), fused=bool(flags.get("FUSED")))
    tall = {"prefix_bwd_kv": entry.keys, "prefix_bwd_block": entry.rows}.get(name, entry.bm) >= 64
    checks = {
        f"{found.spilled} spilled": found.spilled > 0,
        f"{found.shared} bytes of shared memory, the chip has {SHARED_LIMIT[chip]}": found.shared > SHARED_LIMIT[chip],
        "no tensor-core instruction": width == 2 and not found.mma,
        "no warp-group product": chip == "sm90" and width == 2 and tall and not found.wgmma,
        "no asynchronous copy": not chip.startswith("gfx") and how.stages > 1 and not found.copies,
    }
    return [text for text, holds in checks.items() if holds]


def main() -> int:
    """Print the table in Markdown; the exit code is 1 if anything is wrong with a kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="*", default=CHIPS, help=f"by default {', '.join(CHIPS)}")
    parser.add_argument("--quick", action="store_true", help="bf16, head dims 64 and 128, the plain and the fused variant")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}\n\n| chip | kernel | D | dtype | variant | registers | spilled | shared KiB | mma (wgmma) | async copies |")
    print("| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    wrong = 0
    for name, chip, head_dim, width, variant in cases(args.chips, quick=args.quick):
        r = report(build(name, chip, head_dim, width, **VARIANTS[variant]), chip)
        cells = (chip, name, head_dim, NAMES[width], variant, r.registers, r.spilled, f"{r.shared / 1024:.0f}", f"{r.mma} ({r.wgmma})", r.copies)
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        for fault in faults(r, name, chip, head_dim, width, variant):
            wrong += 1
            print(f"FAULT {name} {chip} D={head_dim} {NAMES[width]} {variant}: {fault}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
