"""How much memory a new allocation may take."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

LARGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14
CGROUP = Path("/sys/fs/cgroup")
UNKNOWN = 4 * 2**30  # where the system does not say


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation may take: the device's, or the host's within its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_available(), _container()]
    return min((x for x in limits if x is not None), default=UNKNOWN)


def in_large_pages(t: torch.Tensor) -> torch.Tensor:
    """Ask Linux to back a tensor on a CPU that was not written yet with large pages: fewer faults, and rows all over it are found faster."""
    madvise = (
        getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" and t.device.type == "cpu" else None
    )
    first = -(-t.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    length = (t.data_ptr() + t.numel() * t.element_size() - first) // LARGE_PAGE * LARGE_PAGE
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_HUGEPAGE)  # a hint: it may be refused
    return t


def _available() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", info.read_text(encoding="utf8"))):
        return int(found[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None


def _container() -> int | None:
    """What is left under the container's limit (cgroup v2); files that were only read count as free."""
    try:
        most, now, stat = (
            (CGROUP / f"memory.{name}").read_text(encoding="utf8").strip() for name in ("max", "current", "stat")
        )
    except OSError:
        return None
    cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    return None if most == "max" else max(0, int(most) - int(now) + (int(cached[1]) if cached else 0))
