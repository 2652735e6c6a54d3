"""Early stopping: a prefix ends after a number of evaluations without improvement."""

from __future__ import annotations

from torch import Tensor


def out_of_patience(num_worse: Tensor, patience: Tensor) -> Tensor:
    """Prefixes that training ends early, bool ``[n]``.

    Args:
        num_worse: Number of evaluations since the lowest loss of each prefix, int64 ``[n]``.
        patience: Allowed number of such evaluations, int64 ``[n]``; 0 for no limit.
    """
    return (patience > 0) & (num_worse >= patience)
