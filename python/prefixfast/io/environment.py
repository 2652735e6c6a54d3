"""Machine, versions and commit of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def environment() -> dict[str, Any]:
    """Processor, GPU, threads, scheduling class, versions, commit and date of a measurement."""
    import torch

    packages = ("torch", "transformers", "peft", "prefixfast")
    return {
        "cpu": cpu_name(),
        "cpu_flags": [f for f in CPU_FLAGS if f in _cpuinfo().split()],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "real_time": hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in packages},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """Model name of the processor."""
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found[1] if found else platform.processor()


def version(package: str) -> str | None:
    """Installed version of a package, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf8") if path.exists() else ""


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
