"""A store of ten thousand prefixes: how long putting, opening, counting, listing and looking up one take.

``python benches/system/store.py OUT.jsonl [--stored 10000] [--rounds 5]``: tiny prefixes of 12 layers, so that the time is the store's. Milliseconds, all but
``put`` from files that the system has in memory; ``list`` reads the names, ``scan`` everything about the prefixes but their tensors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from prefixfast import Prefix, PrefixStore
from prefixfast.bench.harness import write_rows

LAYERS, SHAPE = 12, (2, 2, 4)


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Fill a store, time it, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stored", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder)
        times: dict[str, list[float]] = {"put": []}
        for i in range(args.stored):
            prefix = Prefix(
                {f"self.{n}.{x}": torch.randn(SHAPE, generator=g) for n in range(LAYERS) for x in "kv"},
                pos_start=SHAPE[0],
            )
            times["put"].append(milliseconds(lambda i=i, prefix=prefix: store.put(f"user {i}", prefix)))
        some = [f"user {i}" for i in range(0, args.stored, max(1, args.stored // 500))]
        calls: dict[str, Callable[[], object]] = {
            "open": lambda: PrefixStore(folder),
            "len": lambda: len(store),
            "list": lambda: list(PrefixStore(folder)),
            "list again": lambda: list(store),
            "scan": lambda: list(store.scan()),
        }
        for _ in range(args.rounds):
            for name, call in calls.items():
                times.setdefault(name, []).append(milliseconds(call))
            times.setdefault("info", []).extend(milliseconds(lambda name=name: store.info(name)) for name in some)
            times.setdefault("get", []).extend(milliseconds(lambda name=name: store[name]) for name in some[:50])
    rows = [
        {"what": name, "stored": args.stored, "ms": statistics.median(t), "best_ms": min(t), "calls": len(t)}
        for name, t in times.items()
    ]
    write_rows(args.out, rows)
    for row in rows:
        print(f"{row['what']:10} median {row['ms']:9.3f} ms, best {row['best_ms']:9.3f}")


if __name__ == "__main__":
    main()
