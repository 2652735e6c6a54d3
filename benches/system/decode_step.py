"""Where a decode step's time goes on this machine: GPT-2 124M with random weights, 32 rows, by operator, with weights packed and as they are.

``python benches/system/decode_step.py OUT.jsonl [--dtype float32] [--steps 12] [--rounds 4]``: the settings take turns in rounds; a step is the best of all
rounds without the profiler, the shares come from one more pass of each under ``torch.profiler``. ``limit_ms`` is DESIGN's bound of the median step: the median
step without a prefix and 1.3 times what a copy of the distinct prefixes' bytes takes, at the median of the bandwidths of the rounds. ``floor_ms`` has the time
that reading those bytes takes in place of the copy (a sum over large memory): nothing that reads them between the products can be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from prefixfast import Engine, load
from prefixfast.bench.generate import make, random_prefixes
from prefixfast.bench.harness import write_rows
from prefixfast.bench.kernels import roofline
from prefixfast.config import GenerationParams
from prefixfast.engine.loop import Loop
from prefixfast.engine.request import make_requests
from prefixfast.model.memory import in_large_pages

ROWS, PROMPT, NEW = 32, 40, 400
SETTINGS = [
    (0, 0, True),
    (0, 0, False),
    (200, 1, True),
    (200, 32, True),
    (512, 1, True),
    (512, 32, True),
]  # prefix length, distinct, packed
PARTS = {
    "products": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm"),
    "attention": ("prefixfast::attn_decode",),
    "arena writes": ("aten::index_copy_",),
    "choosing": ("aten::argmax", "aten::amax", "aten::gather"),
    "GELU": ("aten::gelu",),
    "norms": ("aten::native_layer_norm",),
}


def decoding(engine: Engine, length: int, distinct: int) -> Loop:
    """A loop whose rows all decode."""
    prompts = torch.randint(
        3, engine.model.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0)
    ).tolist()
    prefixes = random_prefixes(engine.model, length, distinct)
    chosen = [prefixes[i % distinct] for i in range(ROWS)] if length else None
    for request in make_requests(
        engine.model, prompts, chosen, GenerationParams(max_new_tokens=NEW, min_new_tokens=NEW), engine.max_model_len
    ):
        engine.loop.add(next(engine.ids), request)
    while engine.loop.counts["decoded_rows"] < 2 * ROWS:
        engine.loop.step()
    return engine.loop


def reading(memory: torch.Tensor) -> float:
    """Bytes/s of a sum over all of ``memory``."""
    start = time.perf_counter()
    memory.sum()
    return memory.numel() * memory.element_size() / (time.perf_counter() - start)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        models = {packed: stack.enter_context(load(make("gpt2", args.dtype))) for packed in (True, False)}
        row_bytes = sum(2 * s.num_kv_heads * s.head_dim for s in models[True].layers) * models[True].dtype.itemsize
        engines, seconds = {}, {setting: [] for setting in SETTINGS}
        for length, distinct, packed in SETTINGS:
            memory = row_bytes * (256 + distinct * (length + 16) + ROWS * (PROMPT + NEW + 16))
            how = {"max_num_seqs": ROWS, "max_model_len": PROMPT + NEW, "kv_cache_memory": memory, "prepack": packed}
            engines[length, distinct, packed] = stack.enter_context(Engine(models[packed], **how))
        stack.enter_context(torch.inference_mode())
        loops = {setting: decoding(engine, *setting[:2]) for setting, engine in engines.items()}
        copies, reads = [], []
        memory = in_large_pages(torch.empty(1 << 26)).fill_(1.0)
        for _ in range(args.rounds):
            copies.append(roofline(models[True].device, models[True].dtype)[1])
            reads.append(max(reading(memory) for _ in range(5)))
            for setting, loop in loops.items():
                for _ in range(args.steps):
                    start = time.perf_counter()
                    loop.step()
                    seconds[setting].append(time.perf_counter() - start)
        for setting, loop in loops.items():
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(args.steps):
                    loop.step()
            found = {e.key: e.cpu_time_total / args.steps / 1e3 for e in seen.key_averages()}
            parts = {name: round(sum(found.get(key, 0.0) for key in keys), 2) for name, keys in PARTS.items()}
            best, median = (round(1e3 * f(seconds[setting]), 2) for f in (min, statistics.median))
            prefix_bytes = row_bytes * setting[0] * setting[1]
            begin = statistics.median(seconds[0, 0, setting[2]])
            limit, floor = (
                round(1e3 * (begin + share * prefix_bytes / statistics.median(rates)), 2)
                for share, rates in ((1.3, copies), (1.0, reads))
            )
            measured = {"best_ms": best, "median_ms": median, "floor_ms": floor, "limit_ms": limit, "parts_ms": parts}
            rows.append(dict(zip(("prefix_length", "distinct", "packed"), setting, strict=True)) | measured)
            print(rows[-1], flush=True)
    command = f"python benches/system/decode_step.py OUT.jsonl --dtype {args.dtype} --steps {args.steps} --rounds {args.rounds}"
    write_rows(
        args.out,
        [
            {
                "suite": "decode_step",
                "command": command,
                "rows": ROWS,
                "prompt": PROMPT,
                "copy_gb_s": [round(b / 1e9, 1) for b in copies],
                "read_gb_s": [round(b / 1e9, 1) for b in reads],
            },
            *rows,
        ],
    )


if __name__ == "__main__":
    main()
