"""Where the CPU time of a training step goes, and what its matrix products alone would take at their best rate.

torch's profiler gives the time of each operator without that of the operators in it. For the best rate, the products of
each shape run alone, with the second matrix in both layouts, and the fastest counts. Data are random tokens. Run
``python benches/system/training_step.py MODEL --prefixes 64 -o OUT.jsonl`` for one base.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import prefixfast
from prefixfast.bench.harness import write_rows
from prefixfast.bench.train_contenders import Workload
from prefixfast.model.kept_memory import keep_freed_memory

# Parts by a piece of the operator's name, the first that fits; all other operators are the rest.
PARTS = {
    "cross_en": "softmax of the loss",
    "prefixfast_attn": "attention",
    "prefixfast::attn": "attention",
    "flash_attention": "attention",
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "Gelu": "GELU, gated SiLU",
    "gelu": "GELU, gated SiLU",
    "silu": "GELU, gated SiLU",
    "Silu": "GELU, gated SiLU",
    "layer_norm": "norms",
    "RmsNorm": "norms",
}
REST = "all else"


class Steps:
    """Profiles the steps after the first one."""

    def __init__(self, model: prefixfast.Model) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.seconds: list[float] = []

    def on_step(self, step: int, *_: object) -> None:
        """Start after the first step."""
        now = time.process_time()
        if step == 2:
            self.profile.__enter__()
        elif step == 3:
            self.profile.__exit__(None, None, None)
        elif step > 3:
            self.seconds.append(now - self.last)
        self.last = time.process_time()


def best_seconds(left: list[int], right: list[int]) -> float:
    """Seconds of a product of these shapes at its best rate."""
    a, best = torch.randn(left), float("inf")
    for b in (torch.randn(right), torch.randn(right[::-1]).T):
        for _ in range(5):
            start = time.process_time()
            torch.mm(a, b)
            best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prefixes", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with prefixfast.load(args.model, dtype="float32") as base, keep_freed_memory():
        work, steps = Workload(examples=args.batch_size), Steps(base)
        data = {f"user{i}": work.rows(i, base.vocab_size) for i in range(args.prefixes)}
        how = {"prefix_length": args.length, "batch_size": args.batch_size, "max_steps": 6, "learning_rate": 1e-3}
        prefixfast.train(base, data, reparameterization="none", init="random", progress=False, callbacks=[steps], **how)
        times, ideal = Counter[str](), 0.0
        for e in steps.profile.key_averages(group_by_input_shape=True):
            part = next((part for piece, part in PARTS.items() if piece in e.key), REST)
            times[part] += e.self_cpu_time_total / 1e6
            if e.key in ("aten::mm", "aten::addmm"):
                ideal += e.count * best_seconds(*(e.input_shapes[:2] if e.key == "aten::mm" else e.input_shapes[1:3]))
    whole = sum(times.values())
    about = {"base": Path(args.model).name, "prefixes": args.prefixes, "batch_size": args.batch_size}
    about |= {"prefix_length": args.length, "cpu_seconds": [round(s, 3) for s in steps.seconds]}
    about |= {"products_alone": round(ideal, 3), "of_products": round(ideal / min(steps.seconds), 3)}
    rows = [about | {"part": part, "share": round(seconds / whole, 4)} for part, seconds in times.most_common()]
    for row in rows:
        print(f"{row['part']}: {row['share']:.1%}")
    print(f"a step takes {min(steps.seconds):.2f} s, its products alone {ideal:.2f} s")
    write_rows(args.out, [{"suite": "training_step"}, *rows])


if __name__ == "__main__":
    main()
