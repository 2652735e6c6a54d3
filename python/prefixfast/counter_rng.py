"""Counter-based random numbers: a number depends on its seed and counter only.

A counter is hashed instead of advancing a state, so other draws in the same batch do not change a number.
"""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B1


def mix(x: Tensor) -> Tensor:
    """Wellons' 32-bit integer hash lowbias32, in int64 arithmetic; hashes of adjacent integers look independent."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Uniform random numbers in [0, 1) with 53 random bits, in fp64.

    Args:
        seed: Non-negative seeds, int64 of any shape.
        counter: Counters below 2^30, int64 of a shape that broadcasts with that of ``seed``.

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
