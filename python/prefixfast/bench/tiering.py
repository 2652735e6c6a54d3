"""Suite ``tiering``: time between two tokens when a store holds far more prefixes than the arena.

Requests name the prefixes in Zipf order. One engine's arena holds few of them, the other's holds all. A gap is the
time from the end of one step to the end of the next while rows are running. Requests differ in length, so that rows
begin and end at any time. A step takes at most 64 prompt tokens beside its rows, so that a gap is not the time of a
prefill. The two engines alternate in rounds. They get the same requests. No time is reported if their tokens differ.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefixfast.bench.decoding import Decoding
from prefixfast.bench.engine_loop import add_requests
from prefixfast.bench.exact_scores import ExactScores, Text, check_same_tokens
from prefixfast.bench.harness import announce, progress, write_rows
from prefixfast.bench.random_base import make_small
from prefixfast.config import GenerationParams
from prefixfast.engine.engine import Engine
from prefixfast.engine.output import RequestOutput
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore

ROWS, LENGTH, NEW, PROMPT, ROUNDS = 32, 16, (8, 40), 20, 6
POSITIONS = 256
Served = tuple[list[int], tuple[int, ...]]  # tokens of the prompt and of the text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the suite.

    Attributes:
        stored: Number of prefixes in the store.
        resident: Number of prefixes that the small arena holds.
        requests: Number of requests.
    """

    stored: int
    resident: int
    requests: int


def run(output: Path, settings: Settings) -> list[dict[str, Any]]:
    """Measure, print the table, write ``results.jsonl``.

    Raises:
        WrongResultError: If tokens of the two engines differ by more than rounding.
    """
    base, shape = make_small(POSITIONS)
    announce(base.dtype, base.device)
    row_bytes = 2 * shape["n_layer"] * shape["n_embd"] * 4
    own_rows = 80 + ROWS * 64
    g = np.random.default_rng(0)
    weights = 1 / np.arange(1, settings.stored + 1)
    names = [str(i) for i in g.choice(settings.stored, settings.requests, p=weights / weights.sum())]
    plain = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        store = _filled_store(folder, settings.stored, shape)
        how: dict[str, Any] = {
            "store": store,
            "max_num_seqs": ROWS,
            "max_model_len": PROMPT + max(NEW),
            "max_num_batched_tokens": ROWS + 64,
        }
        tiered = Engine(
            base,
            kv_cache_memory=row_bytes * (own_rows + settings.resident * LENGTH),
            host_prefix_memory=200 * LENGTH * row_bytes,
            **how,
        )
        resident = Engine(base, kv_cache_memory=row_bytes * (own_rows + settings.stored * LENGTH), **how)
        with tiered, resident:
            rows, served = _measure({"all resident": resident, "tiered": tiered}, names)
        prompts = [prompt for prompt, _ in served["tiered"]]
        scores = ExactScores(plain, prompts, lambda i: store[names[i]], Decoding(max_new_tokens=max(NEW)))
        texts = (Text(c, i, i, tokens) for c, own in served.items() for i, (_, tokens) in enumerate(own))
        check_same_tokens(texts, scores, "tiering")
    head = {"suite": "tiering", **vars(settings), "shape": shape, "prefix_length": LENGTH}
    ratio = round(rows[1]["p99_ms"] / rows[0]["p99_ms"], 3)
    write_rows(output / "results.jsonl", [head, *rows, {"p99_ratio": ratio}])
    print(f"{table(rows)}\n\n99th percentile, tiered / all resident: {ratio}\n\n{output / 'results.jsonl'}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the time between two tokens."""
    lines = ["| ms between two tokens | median | p99 | steps | files read | evictions |", "| --- |" + " ---: |" * 5]
    for r in rows:
        counts = f"{r['steps']:,} | {r['stats']['reads']:,} | {r['stats']['evictions']:,}"
        lines.append(f"| {r['contender']} | {r['p50_ms']:.1f} | {r['p99_ms']:.1f} | {counts} |")
    return "\n".join(lines)


def _filled_store(folder: str, count: int, shape: dict[str, int]) -> PrefixStore:
    store = PrefixStore(folder)
    size = (LENGTH, shape["n_head"], shape["n_embd"] // shape["n_head"])
    for i in progress(range(count), "bench, filling the store", "prefixes"):
        kv = {f"self.{n}.{x}": torch.randn(size) for n in range(shape["n_layer"]) for x in "kv"}
        store.put(str(i), Prefix(kv, pos_start=LENGTH))
    return store


def _measure(engines: dict[str, Engine], names: list[str]) -> tuple[list[dict[str, Any]], dict[str, list[Served]]]:
    """Records of the results file, and the served requests of each engine. The engines alternate."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    served: dict[str, list[Served]] = {name: [] for name in engines}
    _gaps(engines["all resident"], names, np.random.default_rng(1))  # makes all prefixes resident
    for part in progress(np.array_split(np.array(names), ROUNDS), "bench, tiering", "rounds"):
        for name, engine in engines.items():
            seconds, own = _gaps(engine, part.tolist(), np.random.default_rng(2))
            found[name] += seconds
            served[name] += own
    rows = []
    for name, seconds in found.items():
        p50, p99 = (round(1e3 * float(p), 3) for p in np.percentile(seconds, [50, 99]))
        stats = engines[name].stats()
        rows.append({"contender": name, "steps": len(seconds), "p50_ms": p50, "p99_ms": p99, "stats": stats})
    return rows, served


def _gaps(engine: Engine, names: list[str], g: np.random.Generator) -> tuple[list[float], list[Served]]:
    """Seconds from step to step while rows run, and the served requests. A new one enters when one ends."""
    loop, out, sent = engine.loop, [], 0
    prompts: dict[int, list[int]] = {}
    ended: dict[int, RequestOutput] = {}
    with torch.inference_mode():
        while sent < len(names) or loop.busy:
            while sent < len(names) and len(loop.requests) < ROWS + 8:
                params = GenerationParams(max_new_tokens=int(g.integers(*NEW)))
                prompt = g.integers(3, 8000, PROMPT).tolist()
                (number,) = add_requests(engine, [prompt], [names[sent]], params)
                prompts[number] = prompt
                sent += 1
            start, before = time.perf_counter(), loop.counts["decoded_rows"]
            ended |= loop.step()
            if loop.counts["decoded_rows"] > before:
                out.append(time.perf_counter() - start)
    return out, [(prompt, _tokens(ended[number])) for number, prompt in prompts.items()]


def _tokens(output: RequestOutput) -> tuple[int, ...]:
    """Tokens of an ended request. Its error is raised."""
    if output.error is not None:
        raise output.error
    return tuple(output.sequences[0].token_ids)
