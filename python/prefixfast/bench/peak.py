"""Memory of a measured run: its peak over what was in use before, and the memory of the machine."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from pathlib import Path
from typing import Self

import torch

from prefixfast.model.memory import CGROUP, peak_memory, reset_peak_memory


class PeakOver:
    """Context manager that measures the peak of memory over what was in use when it was entered.

    Args:
        device: Device of the base model. On a CPU the memory is that of the process.

    Attributes:
        nbytes: Bytes of the peak over the memory in use before, None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if sys.platform == "linux":  # freed memory that the allocator keeps would hide what the run takes
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
        self._before = _used(self.device)
        reset_peak_memory(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.nbytes = max(0, peak_memory(self.device) - self._before)


def _used(device: torch.device) -> int | None:
    """Bytes in use: of the GPU's allocator, else of this process. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(status.read_text(encoding="utf8").partition("VmRSS:")[2].split()[0]) * 1024


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of the GPU, or of the machine within its container's limit. None where the system does not tell.

    Args:
        device: Device of the base model.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    limit = CGROUP / "memory.max"
    own = limit.read_text(encoding="utf8").strip() if limit.exists() else "max"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, int(own)) if re.fullmatch(r"\d+", own) else total
