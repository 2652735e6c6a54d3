"""How much memory a new allocation may take."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

UNKNOWN = 4 * 2**30  # where the system does not say


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation may take: the device's, or the host's within its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_available(), _container()]
    return min((x for x in limits if x is not None), default=UNKNOWN)


def _available() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", info.read_text(encoding="utf8"))):
        return int(found[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None


def _container() -> int | None:
    """What is left under the container's limit (cgroup v2)."""
    try:
        most, now = (Path("/sys/fs/cgroup", name).read_text(encoding="utf8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - int(now))
