"""Ten thousand prefixes on disk over an arena that holds a hundred: the time between two tokens of a running request, against the same with all resident.

``python benches/system/tiering.py OUT.jsonl [--stored 10000] [--resident 100] [--requests 3000]``: requests name prefixes in Zipf order; a gap is the time
from one step's end to the next while rows are running. Requests differ in length, so that rows end and begin at any time, and a step takes at most 64 prompt
tokens beside its rows, so that a gap is not a prefill's. The two engines take turns in rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefixfast import Engine, Prefix, PrefixStore
from prefixfast.bench.harness import write_rows
from prefixfast.config import GenerationParams
from prefixfast.engine.request import make_requests

ROWS, LENGTH, NEW, PROMPT, ROUNDS = 32, 16, (8, 40), 20, 6
SHAPE = {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 8000, "n_positions": 256}


def gaps(engine: Engine, names: list[str], g: np.random.Generator) -> list[float]:
    """Seconds from step to step while rows run; a new request enters as one ends."""
    loop, out, sent = engine.loop, [], 0
    with torch.inference_mode():
        while sent < len(names) or loop.busy:
            while sent < len(names) and len(loop.requests) < ROWS + 8:
                call = GenerationParams(max_new_tokens=int(g.integers(*NEW)))
                (request,) = make_requests(
                    engine.model,
                    [g.integers(3, 8000, PROMPT).tolist()],
                    [names[sent]],
                    call,
                    engine.max_model_len,
                    engine.store,
                )
                loop.add(next(engine.ids), request)
                sent += 1
            start, before = time.perf_counter(), loop.counts["decoded_rows"]
            loop.step()
            if loop.counts["decoded_rows"] > before:
                out.append(time.perf_counter() - start)
    return out


def main() -> None:
    """Make the store, run both, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stored", type=int, default=10_000)
    parser.add_argument("--resident", type=int, default=100)
    parser.add_argument("--requests", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**SHAPE)).eval()
    base.generation_config.eos_token_id = None
    row = 2 * SHAPE["n_layer"] * SHAPE["n_embd"] * 4
    own = 80 + ROWS * 64
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder)
        shape = (LENGTH, SHAPE["n_head"], SHAPE["n_embd"] // SHAPE["n_head"])
        for i in range(args.stored):
            store.put(
                str(i),
                Prefix(
                    {f"self.{n}.{x}": torch.randn(shape) for n in range(SHAPE["n_layer"]) for x in "kv"},
                    pos_start=LENGTH,
                ),
            )
        g = np.random.default_rng(0)
        weights = 1 / np.arange(1, args.stored + 1)
        names = [str(i) for i in g.choice(args.stored, args.requests, p=weights / weights.sum())]
        common = {
            "store": store,
            "max_num_seqs": ROWS,
            "max_model_len": PROMPT + max(NEW),
            "max_num_batched_tokens": ROWS + 64,
        }
        few = Engine(
            base, kv_cache_memory=row * (own + args.resident * LENGTH), host_prefix_memory=200 * LENGTH * row, **common
        )
        every = Engine(base, kv_cache_memory=row * (own + args.stored * LENGTH), **common)
        found: dict[str, list[float]] = {"all resident": [], "tiered": []}
        with few, every:
            gaps(every, names, np.random.default_rng(1))  # now they are
            for part in np.array_split(np.array(names), ROUNDS):
                for name, engine in (("all resident", every), ("tiered", few)):
                    found[name] += gaps(engine, part.tolist(), np.random.default_rng(2))
            stats = {"tiered": few.stats(), "all resident": every.stats()}
    rows = []
    for name, seconds in found.items():
        p50, p99 = np.percentile(seconds, [50, 99])
        rows.append(
            {
                "contender": name,
                "steps": len(seconds),
                "p50_ms": round(1e3 * float(p50), 3),
                "p99_ms": round(1e3 * float(p99), 3),
                "stats": stats[name],
            }
        )
        print(rows[-1])
    ratio = round(rows[1]["p99_ms"] / rows[0]["p99_ms"], 3)
    print("p99 tiered / all resident:", ratio)
    setting = {
        "suite": "tiering",
        "stored": args.stored,
        "resident": args.resident,
        "requests": args.requests,
        "shape": SHAPE,
        "prefix_length": LENGTH,
    }
    write_rows(args.out, [setting, *rows, {"p99_ratio": ratio}])


if __name__ == "__main__":
    main()
