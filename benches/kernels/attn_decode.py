"""Decode attention on a CPU, all layers of a step: Rust against torch and against gathered keys.

Each contender is timed alone and between the step's matrix products, after its output has been checked. The shapes are
those of GPT-2 124M, with 32 rows of 40 to 71 own keys.
Run ``chrt -r 1 python benches/kernels/attn_decode.py OUT.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixfast.attention import cpu_decode
from prefixfast.bench.harness import alternate, write_rows
from prefixfast.model.memory import in_large_pages
from prefixfast_kernels import reference
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.testing.tolerance import relative_error
from prefixfast_kernels.torch_decode import decode_fwd

ROWS, HEADS, DIM, LAYERS, OWN_ROWS, RUN = 32, 12, 64, 12, 4096, 16
LENS = [40 + i for i in range(ROWS)]
SIZES = [(0, 1), (200, 1), (200, 4), (200, 32), (512, 1), (512, 4), (512, 32)]
OPTIONS = AttnOptions(DIM**-0.5)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Step:
    """Inputs of one decode step.

    Attributes:
        q: Queries ``[R, H, D]``.
        layers: Keys and values of each layer.
        table: Slot table.
        tables: Tables of the step.
        index: Rows of all keys of each row, prefix and own.
        mask: Additive mask of those keys.
    """

    q: Tensor
    layers: list[tuple[Tensor, Tensor]]
    table: Tensor
    tables: DecodeTables
    index: Tensor
    mask: Tensor

    @classmethod
    def make(cls, length: int, distinct: int, dtype: torch.dtype) -> Step:
        """Random keys in large pages, as in the engine. Prefixes lie before the slots, which come in shuffled runs."""
        torch.manual_seed(0)
        first = distinct * length

        def memory() -> Tensor:
            return in_large_pages(torch.empty(first + OWN_ROWS, HEADS, DIM, dtype=dtype)).normal_()

        layers = [(memory(), memory()) for _ in range(LAYERS)]
        runs = torch.randperm(OWN_ROWS // RUN).view(ROWS, -1)
        table = (first + runs[:, :, None] * RUN + torch.arange(RUN)).view(ROWS, -1)[:, : max(LENS)].int().contiguous()
        requests = [Request(0, ((i % distinct, True),) if length else ()) for i in range(ROWS)]
        tables = decode_tables(LENS, requests, [(i * length, length) for i in range(distinct)] if length else [])
        prefix = torch.arange(length) + torch.arange(ROWS)[:, None] % distinct * length
        seen = torch.arange(length + max(LENS)) < length + torch.tensor(LENS)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None, None]
        return cls(
            torch.randn(ROWS, HEADS, DIM).to(dtype), layers, table, tables, torch.cat([prefix, table], 1).long(), mask
        )


def rust(s: Step, k: Tensor, v: Tensor) -> Tensor:
    """Keys read in place."""
    return cpu_decode.decode(DecodeInputs(s.q, k, v, s.table), s.tables, OPTIONS)[0]


def torch_decode(s: Step, k: Tensor, v: Tensor) -> Tensor:
    """Own keys gathered, prefixes read in place, merged."""
    return decode_fwd(DecodeInputs(s.q, k, v, s.table), s.tables, max(LENS), OPTIONS)[0]


def gathered(s: Step, k: Tensor, v: Tensor) -> Tensor:
    """All keys gathered, then torch's attention."""
    keys, values = (x.index_select(0, s.index.flatten()).view(ROWS, -1, HEADS, DIM).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(s.q[:, :, None], keys, values, s.mask)[:, :, 0]


CONTENDERS: dict[str, Callable[[Step, Tensor, Tensor], Tensor]] = {
    "rust": rust,
    "torch": torch_decode,
    "gather and SDPA": gathered,
}


def products(dtype: torch.dtype) -> Callable[[], None]:
    """Matrix products of one layer, with weights packed as the engine packs them."""
    x = {n: torch.randn(ROWS, n).to(dtype) for n in (768, 3072)}
    shapes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    weights = [
        (x[n], torch.ops.mkldnn._reorder_linear_weight((torch.randn(m, n) * 0.02).to(dtype), ROWS)) for n, m in shapes
    ]

    def run() -> None:
        for hidden, weight in weights:
            torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")

    return run


def measure(length: int, distinct: int, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Seconds of a step, each contender alone and between matrix products.

    Raises:
        RuntimeError: If the error of a contender exceeds the limit.
    """
    s = Step.make(length, distinct, dtype)
    k, v = s.layers[0]
    exact, _ = reference.attn_decode(DecodeInputs(s.q.double(), k.double(), v.double(), s.table), s.tables, OPTIONS)
    for name, call in CONTENDERS.items():
        if (error := relative_error(call(s, k, v), exact)) > LIMIT[dtype]:
            msg = f"{name}: relative error {error:.1e} exceeds {LIMIT[dtype]:.0e}; nothing is timed"
            raise RuntimeError(msg)
    gemm = [products(dtype) for _ in range(LAYERS)]

    def step(call: Callable[[Step, Tensor, Tensor], object] | None, between: bool) -> Callable[[], None]:
        def run() -> None:
            for (k, v), multiply in zip(s.layers, gemm, strict=True):
                if between:
                    multiply()
                if call is not None:
                    call(s, k, v)

        return run

    runs = {(name, between): step(call, between) for name, call in CONTENDERS.items() for between in (False, True)}
    runs["products alone", True] = step(None, True)
    for run in runs.values():
        run()
    found = alternate(runs, rounds)  # type: ignore[arg-type, type-var]
    case = {"prefix_length": length, "distinct": distinct, "dtype": str(dtype)[6:]}
    return [
        {**case, "contender": n, "with_products": b, "seconds": [round(x, 6) for x in t.seconds]}
        for (n, b), t in found.items()
    ]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    rows: list[dict[str, object]] = [
        {"suite": "attn_decode", "command": " ".join(sys.argv), "layers": LAYERS, "rows": ROWS, "own_keys": LENS}
    ]
    with torch.inference_mode():
        for length, distinct in SIZES:
            made = measure(length, distinct, getattr(torch, args.dtype), args.rounds)
            rows += made
            for r in made:
                where = "with products" if r["with_products"] else "alone"
                best, median = (f(r["seconds"]) * 1e3 for f in (min, lambda s: sorted(s)[len(s) // 2]))
                case = f"P={length} x {distinct}, {r['dtype']}, {r['contender']}, {where}"
                print(f"{case}: {best:.1f} ms (median {median:.1f})", flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
