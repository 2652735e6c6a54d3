"""Free and peak memory of a device, and large memory pages."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path

import torch

LARGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14
CGROUP = Path("/sys/fs/cgroup")
UNKNOWN = 4 * 2**30  # assumed free bytes on systems that do not tell


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation can take: free memory of the GPU, or of the host within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_system_available(), _container_available()]
    return min((x for x in limits if x is not None), default=UNKNOWN)


def in_large_pages(t: torch.Tensor) -> torch.Tensor:
    """Ask Linux to back a tensor with large pages, which makes fewer page faults and TLB misses.

    Args:
        t: Tensor that was not written yet. Tensors that are not on a CPU are left alone.

    Returns:
        The same tensor.
    """
    madvise = (
        getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" and t.device.type == "cpu" else None
    )
    first = -(-t.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    length = (t.data_ptr() + t.numel() * t.element_size() - first) // LARGE_PAGE * LARGE_PAGE
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_HUGEPAGE)  # only a hint to the kernel
    return t


def _system_available() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", info.read_text(encoding="utf8"))):
        return int(found[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None


def _container_available() -> int | None:
    """Bytes left under the container's limit (cgroup v2), None without one; the inactive file cache counts as free."""
    try:
        most, now, stat = (
            (CGROUP / f"memory.{name}").read_text(encoding="utf8").strip() for name in ("max", "current", "stat")
        )
    except OSError:
        return None
    cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    return None if most == "max" else max(0, int(most) - int(now) + (int(cached[1]) if cached else 0))


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on, where the system can.

    Args:
        device: Device of the base model.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # systems other than Linux, and processes without the permission
        Path("/proc/self/clear_refs").write_text("5", encoding="utf8")


def peak_memory(device: torch.device) -> int:
    """Largest memory use in bytes: of the GPU's allocator, else of this process. 0 where no system reports it.

    Args:
        device: Device of the base model.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would also count the process that started this one
        return int(status.read_text(encoding="utf8").partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
