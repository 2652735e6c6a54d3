"""Report the resources of the shipped kernels, compiled for every supported chip.

The report has registers, spills, shared memory, tensor-core and copy instructions.
``python -m prefixfast_kernels.testing.compile_report`` prints the table of kernels/resources.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from prefixfast_kernels.testing.shipped_kernels import Kernel, compile_kernel, shipped_kernels
from prefixfast_kernels.tile_configs import (
    CHIPS,
    DECODE_CONFIGS,
    KERNELS,
    PACKED_CONFIGS,
)

SHARED_LIMIT = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
TENSOR_CORE_KERNELS = (*KERNELS, "prefix_decode")  # kernels that multiply tiles


@dataclass(frozen=True)
class Report:
    """Resources of one compiled kernel.

    Attributes:
        registers: Registers of a thread.
        spilled: Spills to memory, in bytes (NVIDIA) or registers (AMD).
        shared: Shared memory of a program in bytes.
        mma: Number of tensor-core instructions, Hopper's warp-group instructions included.
        wgmma: Number of Hopper's warp-group instructions.
        copies: Number of asynchronous copies from memory to shared memory.
    """

    registers: int
    spilled: int
    shared: int
    mma: int
    wgmma: int
    copies: int


def read_report(compiled: Any, chip: str) -> Report:
    """Resources of a compiled kernel."""
    if chip.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        found = {
            n: int(m[1]) if (m := re.search(rf"\.{n}:\s+(\d+)", text)) else 0
            for n in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        return Report(
            found["vgpr_count"], found["vgpr_spill_count"], compiled.metadata.shared, text.count("v_mfma"), 0, 0
        )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"], encoding="utf8")
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
        compiled.metadata.shared,
        mma,
        count["HGMMA"],
        count["LDGSTS"] + count["UTMALDG"],
    )


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False).stdout


def find_faults(report: Report, kernel: Kernel) -> list[str]:
    """Faults of a compiled kernel.

    Faults are spills, too much shared memory, products that miss the tensor cores, and loads that are not asynchronous.
    """
    name, chip = kernel.name, kernel.chip
    packed, decode = PACKED_CONFIGS[kernel.config_key], DECODE_CONFIGS[kernel.config_key]
    rows = {"prefix_bwd_kv": packed.keys, "prefix_bwd_block": packed.rows, "prefix_decode": decode.bm}
    tall = rows.get(name, packed.bm) >= 64  # warp-group instructions take tiles of at least 64 rows
    multiplies = name in TENSOR_CORE_KERNELS
    half = kernel.dtype != "fp32" and multiplies
    pipelined = multiplies and kernel.compile_config().stages > 1 and not chip.startswith("gfx")
    limit = SHARED_LIMIT[chip]
    faults = {
        f"{report.spilled} spilled": report.spilled > 0,
        f"{report.shared} bytes of shared memory, the chip has {limit}": report.shared > limit,
        "no tensor-core instruction": half and not report.mma,
        "no warp-group instruction": chip == "sm90" and half and tall and not report.wgmma,
        "no asynchronous copy": pipelined and not report.copies,
    }
    return [text for text, holds in faults.items() if holds]


COLUMNS = (
    "chip",
    "kernel",
    "D",
    "dtype",
    "variant",
    "registers",
    "spilled",
    "shared KiB",
    "mma (wgmma)",
    "async copies",
)


def main() -> int:
    """Print the table in Markdown. The exit code is 1 if any kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="*", default=CHIPS, help=f"chips to compile for; default: {', '.join(CHIPS)}")
    parser.add_argument(
        "--quick", action="store_true", help="compile bf16 with head dims 64 and 128, plain and fused variant, only"
    )
    args = parser.parse_args()
    print(f"Triton {triton.__version__}\n\n| {' | '.join(COLUMNS)} |")
    print("| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    failed = False
    for kernel in shipped_kernels(args.chips, quick=args.quick):
        name, chip, head_dim, dtype, variant = kernel
        r = read_report(compile_kernel(kernel), chip)
        resources = (r.registers, r.spilled, f"{r.shared / 1024:.0f}", f"{r.mma} ({r.wgmma})", r.copies)
        print("|", " | ".join(map(str, (chip, name, head_dim, dtype, variant, *resources))), "|", flush=True)
        for fault in find_faults(r, kernel):
            failed = True
            print(f"FAULT {name} {chip} D={head_dim} {dtype} {variant}: {fault}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
