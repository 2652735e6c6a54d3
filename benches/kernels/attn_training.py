"""Attention of a training step on a CPU: CPU time and error of one call of Rust, and of torch's operators, merged.

CPU time, of one thread, counts other processes of the machine less than wall time does. Freed memory is kept, as in
training. The error is the largest relative error of output, dq, dk, dv and both gradients of prefixes against the
specification in fp64. Run ``python benches/kernels/attn_training.py OUT.jsonl``.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefixfast.attention import cpu_dense, cpu_packed
from prefixfast.bench.harness import write_rows
from prefixfast.model.kept_memory import keep_freed_memory
from prefixfast_kernels import torch_attn
from prefixfast_kernels.inputs import AttnGrads, AttnOptions, NeedsGrad, OutputGrad
from prefixfast_kernels.testing.packed_cases import Case, output_errors
from prefixfast_kernels.testing.packed_problem import PackedProblem
from prefixfast_kernels.testing.tables import Request
from prefixfast_kernels.tile_selection import TileSizes

SIZES = TileSizes(16, 16, 16, 16)
# Prefixes, sequences of each, fewest and most tokens of a sequence, prefix rows, and heads by name.
STEPS = {
    "14 prefixes of 10 rows, 70 x 20 to 80 tokens, nlg-10m": (14, 5, (20, 80), 10, (5, 5, 64)),
    "1 prefix of 10 rows, 10 x 40 to 100 tokens, SmolLM2": (1, 10, (40, 100), 10, (9, 3, 64)),
    "1 prefix of 200 rows, 8 x 60 to 130 tokens, SmolLM2": (1, 8, (60, 130), 200, (9, 3, 64)),
    "1 prefix of 10 rows, 4 x 500 tokens, GPT-2": (1, 4, (500, 500), 10, (12, 12, 64)),
}
Forward = Callable[[PackedProblem, AttnOptions], tuple[Tensor, Tensor]]
Backward = Callable[[OutputGrad, PackedProblem, AttnOptions], AttnGrads]
WAYS: dict[str, tuple[Forward, Backward]] = {
    "torch": (
        lambda p, options: torch_attn.attn_fwd(p.inputs, p.tables, options, None, cpu_dense.sdpa_lse),
        lambda grad, p, options: torch_attn.attn_bwd(grad, p.inputs, p.tables, options, NeedsGrad()),
    ),
    "Rust": (
        lambda p, options: cpu_packed.attn_fwd(p.inputs, p.tables, options),
        lambda grad, p, options: cpu_packed.attn_bwd(grad, p.inputs, p.tables, options, NeedsGrad()),
    ),
}


def make(name: str) -> Case:
    """The step of a name."""
    prefixes, count, (low, high), rows, heads = STEPS[name]
    chance = random.Random(0)
    requests = [Request(chance.randint(low, high), ((i, True),)) for i in range(prefixes) for _ in range(count)]
    return Case(tuple(requests), (rows,) * prefixes, heads)


def measure(name: str, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Time and error of both ways on one step."""
    case = make(name)
    problem = case.problem(SIZES).cast(dtype)
    options, rows = case.options(problem.scale), []
    outputs = {way: forward(problem, options) for way, (forward, _) in WAYS.items()}
    seconds: dict[tuple[str, str], list[float]] = {(way, part): [] for way in WAYS for part in ("forward", "backward")}
    for _ in range(rounds):
        for way, (forward, backward) in WAYS.items():
            grad = OutputGrad(problem.do, *outputs[way])
            start = time.process_time()
            forward(problem, options)
            between = time.process_time()
            backward(grad, problem, options)
            seconds[way, "forward"].append(round(between - start, 6))
            seconds[way, "backward"].append(round(time.process_time() - between, 6))
    for way, (forward, backward) in WAYS.items():

        def run(
            p: PackedProblem, case: Case, _: TileSizes, forward: Forward = forward, backward: Backward = backward
        ) -> list[Tensor]:
            options = case.options(p.scale)
            o, lse = forward(p, options)
            return [o, lse, *(g for g in backward(OutputGrad(p.do, o, lse), p, options) if g is not None)]

        errors, _ = output_errors(case, dtype, SIZES, run)
        common = {"step": name, "dtype": str(dtype).removeprefix("torch."), "contender": way}
        times = {part: seconds[way, part] for part in ("forward", "backward")}
        rows.append(common | {"error": float(f"{max(errors):.2g}"), "cpu_seconds": times})
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = [{"suite": "attn_training"}]
    for name in STEPS:
        for dtype in (torch.float32, torch.bfloat16):
            with keep_freed_memory():
                rows += (made := measure(name, dtype, args.rounds))
            for r in made:
                times: dict[str, list[float]] = r["cpu_seconds"]  # type: ignore[assignment]
                best = {part: f"{min(s) * 1e3:.2f} ms" for part, s in times.items()}
                print(f"{name}, {r['dtype']}, {r['contender']}: {best}, error {r['error']}", flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
