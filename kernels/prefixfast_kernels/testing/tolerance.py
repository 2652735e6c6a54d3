"""The rule that decides whether a backend's results are right.

A result passes if its error against the specification in fp64 is at most twice (gradients: three times) the error of
the specification computed in the backend's own dtype, plus a rounding floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Some gradients are zero in exact arithmetic (a window of one token without a prefix), so a bound on the ratio alone
# would divide by zero.
FLOOR = {torch.float64: 1.5e-14, torch.float32: 4e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, divided by the largest absolute expected value."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()


def relative_errors(got: Iterable[Tensor], expected: Iterable[Tensor]) -> list[float]:
    """Relative error of each tensor on the CPU."""
    return [relative_error(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True)]


def within_tolerance(got: Sequence[float], same_dtype: Sequence[float], floor: float) -> bool:
    """Whether results pass. NaN fails.

    Args:
        got: Errors of a backend: output, log-sum-exp, then the gradients, if any.
        same_dtype: Errors of the specification in the dtype of the backend, in the same order.
        floor: Rounding floor of the dtype, an entry of `FLOOR`.
    """
    factors = [2 if i < 2 else 3 for i in range(len(got))]
    return all(e <= factor * s + floor for e, s, factor in zip(got, same_dtype, factors, strict=True))
