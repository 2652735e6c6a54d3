"""Suite ``decode-step``: time of a decode step of 32 rows of GPT-2 124M with random weights, and its share by operator.

The settings alternate in rounds. The time of a step comes from runs without the profiler, the shares from one more
pass under ``torch.profiler``. Two bounds stand beside the measured time, both relative to the median step without a
prefix. ``floor_ms`` adds the time of reading the bytes of the distinct prefixes once. ``limit_ms`` adds 1.3 times the
time of copying them. Bandwidths are the medians over the rounds. No time is reported if the tokens of requests with the
same prompt and prefix differ between the settings.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from prefixfast.bench.decoding import Decoding
from prefixfast.bench.engine_loop import add_requests
from prefixfast.bench.exact_scores import ExactScores, Text, check_same_tokens
from prefixfast.bench.harness import announce, progress, write_rows
from prefixfast.bench.random_base import make, random_prefixes
from prefixfast.bench.roofline import roofline
from prefixfast.config import GenerationParams
from prefixfast.engine.engine import Engine
from prefixfast.engine.loop import Loop
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.model.memory import in_large_pages

ROWS, PROMPT, NEW = 32, 40, 400
COMPARED = 2  # requests whose tokens are compared


class Setting(NamedTuple):
    """One engine.

    Attributes:
        length: Rows of each prefix, 0 for no prefix.
        distinct: Number of distinct prefixes.
        packed: Whether the weights are packed for the CPU.
    """

    length: int
    distinct: int
    packed: bool


SETTINGS = (
    Setting(0, 0, True),
    Setting(0, 0, False),
    Setting(200, 1, True),
    Setting(200, 32, True),
    Setting(512, 1, True),
    Setting(512, 32, True),
)
# Operators of each part of a step, by their names in the profiler.
PARTS = {
    "products": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm"),
    "attention": ("prefixfast::attn_decode",),
    "arena writes": ("prefixfast::kv_write",),
    "choosing": ("aten::argmax", "aten::amax", "aten::gather"),
    "GELU": ("aten::gelu",),
    "norms": ("aten::native_layer_norm",),
}


@dataclass
class Times:
    """Measurements of all rounds.

    Attributes:
        seconds: Seconds of each step, by setting.
        copies: Bytes a second of a copy, by round.
        reads: Bytes a second of a sum over large memory, by round.
    """

    seconds: dict[Setting, list[float]] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)


def run(output: Path, *, dtype: str, steps: int, rounds: int, command: str) -> list[dict[str, Any]]:
    """Measure, print the table, write ``results.jsonl``.

    Args:
        output: Folder to write to.
        dtype: Compute dtype.
        steps: Steps of each setting in a round.
        rounds: Number of repetitions.
        command: Command that repeats the measurement.

    Raises:
        WrongResultError: If tokens differ by more than rounding.
    """
    with contextlib.ExitStack() as stack:
        models = {packed: stack.enter_context(load(make("gpt2", dtype))) for packed in (True, False)}
        announce(models[True].dtype, models[True].device)
        engines = {s: stack.enter_context(_engine(models[s.packed], s)) for s in SETTINGS}
        stack.enter_context(torch.inference_mode())
        loops = {setting: _decoding_loop(engine, setting) for setting, engine in engines.items()}
        times = _measure(loops, models[True], steps, rounds)
        _check_tokens(loops, models[True], make("gpt2", dtype))
        row_bytes = _row_bytes(models[True])
        rows = [_record(setting, loop, times, steps, row_bytes) for setting, loop in loops.items()]
    head = {
        "suite": "decode_step",
        "command": command,
        "rows": ROWS,
        "prompt": PROMPT,
        "copy_gb_s": [round(b / 1e9, 1) for b in times.copies],
        "read_gb_s": [round(b / 1e9, 1) for b in times.reads],
    }
    write_rows(output / "results.jsonl", [head, *rows])
    print(f"{table(rows)}\n\n{output / 'results.jsonl'}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of milliseconds a step, with the shares by operator."""
    lines = [
        "| ms a step | best | median | floor | limit | " + " | ".join(PARTS) + " |",
        "| --- |" + " ---: |" * (4 + len(PARTS)),
    ]
    for r in rows:
        name = f"P={r['prefix_length']}, {r['distinct']} distinct, weights {'packed' if r['packed'] else 'as they are'}"
        best = f"{r['best_ms']:.2f}" if r["timed_steps"] > 1 else ""  # a single step has no spread
        cells = [r["median_ms"], r["floor_ms"], r["limit_ms"], *r["parts_ms"].values()]
        lines.append(f"| {name} | {best} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    return "\n".join(lines)


def _row_bytes(model: Model) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return sum(s.row_numbers for s in model.layers) * model.dtype.itemsize


def _engine(model: Model, setting: Setting) -> Engine:
    rows = 256 + setting.distinct * (setting.length + 16) + ROWS * (PROMPT + NEW + 16)
    return Engine(
        model,
        max_num_seqs=ROWS,
        max_model_len=PROMPT + NEW,
        kv_cache_memory=_row_bytes(model) * rows,
        prepack=setting.packed,
    )


def _prompts(model: Model) -> list[list[int]]:
    """Token ids of the prompts, the same for every setting."""
    g = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(3, model.vocab_size, (ROWS, PROMPT), generator=g).tolist()
    return prompts


def _check_tokens(loops: dict[Setting, Loop], model: Model, plain: PreTrainedModel) -> None:
    """Compare the tokens that the first `COMPARED` requests have so far in the settings of equal prefix length."""
    for length in dict.fromkeys(setting.length for setting in loops):
        prefixes = random_prefixes(model, length, COMPARED) if length else []
        decoding = Decoding.exactly(NEW, model)
        scores = ExactScores(plain, _prompts(model), prefixes.__getitem__, decoding)
        texts = [
            Text(str(setting), i, i % setting.distinct if length else None, tuple(sequences[0].token_ids))
            for setting, loop in loops.items()
            if setting.length == length
            for i, sequences in enumerate(list(loop.outputs.sequences.values())[:COMPARED])
        ]
        check_same_tokens(texts, scores, f"P={length}")


def _decoding_loop(engine: Engine, setting: Setting) -> Loop:
    """Loop of an engine in which all rows decode."""
    prompts = _prompts(engine.model)
    prefixes = random_prefixes(engine.model, setting.length, setting.distinct)
    chosen = [prefixes[i % setting.distinct] for i in range(ROWS)] if setting.length else None
    params = GenerationParams(**Decoding.exactly(NEW, engine.model).params())
    add_requests(engine, prompts, chosen, params)
    while engine.loop.counts["decoded_rows"] < 2 * ROWS:
        engine.loop.step()
    return engine.loop


def _measure(loops: dict[Setting, Loop], model: Model, steps: int, rounds: int) -> Times:
    """Time the steps of all settings, which alternate in rounds, and the bandwidths before each round."""
    times = Times({setting: [] for setting in loops})
    memory = in_large_pages(torch.empty(1 << 26)).fill_(1.0)
    for _ in progress(range(rounds), "bench, decode steps", "rounds"):
        times.copies.append(roofline(model.device, model.dtype)[1])
        times.reads.append(max(_read_bandwidth(memory) for _ in range(5)))
        for setting, loop in loops.items():
            for _ in range(steps):
                start = time.perf_counter()
                loop.step()
                times.seconds[setting].append(time.perf_counter() - start)
    return times


def _read_bandwidth(memory: torch.Tensor) -> float:
    """Bytes a second of a sum over all of ``memory``."""
    start = time.perf_counter()
    memory.sum()
    return memory.numel() * memory.element_size() / (time.perf_counter() - start)


def _record(setting: Setting, loop: Loop, times: Times, steps: int, row_bytes: int) -> dict[str, Any]:
    """Record of the results file of one setting."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            loop.step()
    found = {e.key: e.cpu_time_total / steps / 1e3 for e in seen.key_averages()}
    prefix_bytes = row_bytes * setting.length * setting.distinct
    start = statistics.median(times.seconds[Setting(0, 0, setting.packed)])
    floor = start + prefix_bytes / statistics.median(times.reads)
    limit = start + 1.3 * prefix_bytes / statistics.median(times.copies)
    return {
        "prefix_length": setting.length,
        "distinct": setting.distinct,
        "packed": setting.packed,
        "timed_steps": len(times.seconds[setting]),
        "best_ms": round(1e3 * min(times.seconds[setting]), 2),
        "median_ms": round(1e3 * statistics.median(times.seconds[setting]), 2),
        "floor_ms": round(1e3 * floor, 2),
        "limit_ms": round(1e3 * limit, 2),
        "parts_ms": {name: round(sum(found.get(key, 0.0) for key in keys), 2) for name, keys in PARTS.items()},
    }
