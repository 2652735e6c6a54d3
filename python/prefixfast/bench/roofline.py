"""Speed of the machine itself: FLOP/s of a matrix product and bytes/s of a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prefixfast.bench.harness import alternate


def roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a copy, both measured now."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    size = 1 << 30 if device.type == "cuda" else 1 << 26
    # Ones, since untouched pages of zeros would all be one page of memory.
    big = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
    other = torch.empty_like(big)
    product = seconds_of(lambda: torch.mm(a, b), device, 5)
    copy = seconds_of(lambda: other.copy_(big), device, 5)
    return 2 * n**3 / min(product), 2 * big.numel() * dtype.itemsize / min(copy)


def synchronized(call: Callable[[], object], device: torch.device, repeats: int) -> Callable[[], None]:
    """Function that makes ``repeats`` calls and waits for the device."""

    def timed() -> None:
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return timed


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each of ``rounds`` calls, after one that warms up."""
    timed = synchronized(call, device, 1)
    timed()
    return list(alternate({"it": timed}, rounds)["it"].seconds)
