"""Timing on shared machines and results files.

Contenders alternate, so that a slow minute of the machine hits all of them. All times are recorded. Every results file
names the machine, the versions and the commit.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from prefixfast.errors import PrefixFastError
from prefixfast.io.atomic import replace_file
from prefixfast.io.environment import cpu_name, environment
from prefixfast.io.progress import track

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest relative error of an attention output that is still timed.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class WrongResultError(PrefixFastError, RuntimeError):
    """A contender computes something else than the reference, so that no speed is reported."""


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one contender, one number for each round."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)


def alternate(contenders: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, Timing]:
    """Time each contender once a round, in turn. The caller has warmed them up."""
    seconds: dict[K, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def best_of(rounds: int) -> str:
    """Caption of the fastest of several rounds."""
    return "one round" if rounds == 1 else f"best of {rounds} rounds"


def announce(dtype: torch.dtype, device: torch.device) -> None:
    """Print compute dtype, device and number of threads of a run on standard error."""
    name = str(dtype).removeprefix("torch.")
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    print(f"computing in {name} on {device}, {threads}, {cpu_name()}", file=sys.stderr)


def progress(items: Collection[T], label: str, unit: str, *, shown: bool = True) -> Iterator[T]:
    """Yield ``items`` and report how many are finished: a bar on a terminal, a line every 10 s in a pipe."""
    if not shown:
        yield from items
    else:
        with track(items, label, len(items), unit) as each:
            yield from each


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a measurement. ``auto`` is the GPU in bf16 if there is one, else the CPU in fp32."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return where, DTYPES[dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines, the first of which holds the `environment`."""
    lines = [{"environment": environment()}, *rows]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
