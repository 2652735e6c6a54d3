"""Suites of attention alone: ``kernels`` and ``decode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixfast.cli.bench.options import OUTPUT, AttentionDtype, Rounds, check_known


def kernels(
    output: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.jsonl and kernels.png.")] = Path(
        "bench-kernels"
    ),
    dtype: AttentionDtype = "auto",
    rounds: Rounds = 7,
) -> None:
    """Measure packed attention with shared prefixes, forward and backward, and torch's attention on copied prefixes.

    On a GPU the kernels are first compared with the reference.
    """
    from prefixfast.bench.harness import DTYPES
    from prefixfast.bench.kernels import run

    check_known("--dtype", dtype, ("auto", *DTYPES))
    run(output, dtype=dtype, rounds=rounds)


def decode(
    output: Annotated[Path, typer.Option(*OUTPUT, help="Folder for decode.jsonl.")] = Path("bench-decode"),
    dtype: AttentionDtype = "auto",
    rounds: Rounds = 7,
) -> None:
    """Measure decode attention of one layer with shared prefixes, and torch's on gathered or copied prefixes."""
    from prefixfast.bench.decode import run
    from prefixfast.bench.harness import DTYPES

    check_known("--dtype", dtype, ("auto", *DTYPES))
    run(output, dtype=dtype, rounds=rounds)
