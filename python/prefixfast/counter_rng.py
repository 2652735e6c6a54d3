"""Random numbers from counters: the same number for the same counters, whatever else is drawn beside it."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B1


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64 arithmetic (Wellons' lowbias32): adjacent counters give independent-looking bits."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), fp64, of 53 random bits.

    Args:
        seed: int64 of any size, non-negative.
        counter: int64 below 2^30, broadcast with ``seed``.

    Example:
        >>> import torch
        >>> a, b = (uniform(torch.tensor([7]), torch.tensor([i])) for i in (0, 1))
        >>> bool(0 <= a < 1 and a != b and a == uniform(torch.tensor([7]), torch.tensor([0])))
        True
    """
    first = mix(seed + GOLDEN)
    second = mix((seed >> 32) ^ mix(first))
    high = mix(second + mix(counter + first))
    low = mix(high + GOLDEN + mix(counter ^ second))
    return ((high << 21) + (low >> 11)).double() / 2**53
