"""Suite ``store``: time of putting, opening, counting, listing and reading in a store of many prefixes.

The prefixes are tiny and have 12 layers, so that the measured time is the store's. All operations but ``put`` read
files that the system holds in memory. ``list`` reads the names, ``scan`` everything about the prefixes but their
tensors.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefixfast.bench.harness import progress, write_rows
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore

LAYERS, SHAPE = 12, (2, 2, 4)


def run(output: Path, *, stored: int, rounds: int) -> list[dict[str, Any]]:
    """Fill a store in a temporary folder, measure, print the table, write ``results.jsonl``.

    Args:
        output: Folder to write to.
        stored: Number of prefixes in the store.
        rounds: Number of repetitions.
    """
    with tempfile.TemporaryDirectory() as folder:
        store, put = _filled(folder, stored)
        times = {"put": put, **_reads(store, folder, stored, rounds)}
    rows: list[dict[str, Any]] = [
        {"what": name, "stored": stored, "ms": statistics.median(t), "best_ms": min(t), "calls": len(t)}
        for name, t in times.items()
    ]
    write_rows(output / "results.jsonl", rows)
    print(f"{table(rows)}\n\n{output / 'results.jsonl'}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of milliseconds by operation."""
    lines = [f"| ms, {rows[0]['stored']:,} prefixes | median | best | calls |", "| --- | ---: | ---: | ---: |"]
    for r in rows:
        best = f"{r['best_ms']:.3f}" if r["calls"] > 1 else ""  # a single call has no spread
        lines.append(f"| {r['what']} | {r['ms']:.3f} | {best} | {r['calls']:,} |")
    return "\n".join(lines)


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _filled(folder: str, count: int) -> tuple[PrefixStore, list[float]]:
    """Store of ``count`` prefixes, and the milliseconds of each `put`."""
    g, store, times = torch.Generator().manual_seed(0), PrefixStore(folder), []
    for i in progress(range(count), "bench, filling the store", "prefixes"):
        kv = {f"self.{n}.{x}": torch.randn(SHAPE, generator=g) for n in range(LAYERS) for x in "kv"}
        prefix = Prefix(kv, pos_start=SHAPE[0])
        times.append(_milliseconds(lambda i=i, prefix=prefix: store.put(f"user {i}", prefix)))  # type: ignore[misc]
    return store, times


def _reads(store: PrefixStore, folder: str, stored: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each reading operation."""
    some = [f"user {i}" for i in range(0, stored, max(1, stored // 500))]
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: PrefixStore(folder),
        "len": lambda: len(store),
        "list": lambda: list(PrefixStore(folder)),
        "list again": lambda: list(store),
        "scan": lambda: list(store.scan()),
    }
    times: dict[str, list[float]] = {name: [] for name in (*calls, "info", "get")}
    for _ in progress(range(rounds), "bench, store", "rounds"):
        for name, call in calls.items():
            times[name].append(_milliseconds(call))
        times["info"] += [_milliseconds(lambda name=name: store.info(name)) for name in some]  # type: ignore[misc]
        times["get"] += [_milliseconds(lambda name=name: store[name]) for name in some[:50]]  # type: ignore[misc]
    return times
