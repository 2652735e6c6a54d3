"""Suites of the engine and the store: ``decode-step``, ``fairness``, ``tiering`` and ``store``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixfast.cli.bench.options import OUTPUT, Rounds, check_known, spelt

Output = Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.jsonl.")]
Stored = Annotated[int, typer.Option(min=1, help="Number of prefixes in the store.")]


def decode_step(
    output: Output = Path("bench-decode-step"),
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32, bfloat16 or float16.")] = "float32",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each setting in a round.")] = 12,
    rounds: Rounds = 4,
) -> None:
    """Measure a decode step of 32 sequences of GPT-2 124M with random weights, and the time of its operators.

    The settings differ in prefix length, number of distinct prefixes and layout of the weights.
    """
    from prefixfast.bench.decode_step import run
    from prefixfast.bench.harness import DTYPES

    check_known("--dtype", dtype, DTYPES)
    command = spelt("decode-step", dtype=dtype, steps=steps, rounds=rounds)
    run(output, dtype=dtype, steps=steps, rounds=rounds, command=command)


def fairness(
    output: Output = Path("bench-fairness"),
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for which requests arrive in each run.")] = 10.0,
    rounds: Rounds = 5,
) -> None:
    """Measure seven tenants' time per token when an eighth sends ten times as many requests as each of the others.

    A round has four runs: the eighth sends as many requests as the others or ten times as many, each with one tenant
    for every sender and with a single tenant for all.
    """
    from prefixfast.bench.fairness import run

    command = spelt("fairness", seconds=f"{seconds:g}", rounds=rounds)
    run(output, seconds=seconds, rounds=rounds, command=command)


def tiering(
    output: Output = Path("bench-tiering"),
    stored: Stored = 10_000,
    resident: Annotated[int, typer.Option(min=1, help="Number of prefixes that the small KV cache holds.")] = 100,
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 3000,
) -> None:
    """Measure the time between two tokens with a KV cache for few of the store's prefixes, and with one for all."""
    from prefixfast.bench.tiering import Settings, run

    run(output, Settings(stored=stored, resident=resident, requests=requests))


def store(
    output: Output = Path("bench-store"),
    stored: Stored = 10_000,
    rounds: Rounds = 5,
) -> None:
    """Measure putting, opening, counting, listing and reading in a store of many prefixes."""
    from prefixfast.bench.store import run

    run(output, stored=stored, rounds=rounds)
