"""`relative_error`, by which logits of two forwards are compared."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference relative to that of the expected logits around their mean."""
    got, expected = got.double(), expected.double()
    size = (expected - expected.mean(-1, keepdim=True)).norm()
    error = (got - expected).norm()
    return 0.0 if not error else float((error / size).item()) if torch.isfinite(error) else float("inf")
