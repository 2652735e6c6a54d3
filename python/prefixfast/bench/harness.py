"""Timing on shared machines: contenders alternate, minimum and median are kept, every row names the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from prefixfast.io.atomic import replace_file

K = TypeVar("K", bound=Hashable)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIMIT = {
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 1e-2,
}  # relative error of attention above which nothing is timed
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one contender."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The minimum."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)


def alternate(contenders: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, Timing]:
    """Time all contenders in turn, ``rounds`` times; the caller has warmed them up."""
    seconds: dict[K, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command: what a figure means nothing without."""
    packages = ("torch", "transformers", "peft", "prefixfast")
    return {
        "cpu": cpu_name(),
        "cpu_flags": [f for f in FLAGS if f in _cpuinfo().split()],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in packages},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The processor's own name."""
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found[1] if found else platform.processor()


def version(package: str) -> str | None:
    """Installed version, None if absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines; the first one is the environment."""
    lines = [{"environment": environment()}, *rows]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf8") if path.exists() else ""


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
