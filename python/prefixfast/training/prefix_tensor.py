"""`PrefixTensor`, a tensor with rows of several prefixes of a group."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PrefixTensor(NamedTuple):
    """A tensor with equally many rows of each of m prefixes, in the order of their numbers.

    Attributes:
        tensor: Rows ``[m * r, ...]``.
        owners: Numbers of the prefixes, int64 ``[m]``, ascending, None for all prefixes of the group.
        rate: Factor on the learning rates of the prefixes.
    """

    tensor: Tensor
    owners: Tensor | None = None
    rate: float = 1.0

    def own(self, values: Tensor) -> Tensor:
        """Values of the prefixes that have rows, ``[m]``, from those of all prefixes ``[n]``."""
        return values if self.owners is None else values[self.owners]

    def by_row(self, values: Tensor) -> Tensor:
        """Value of the prefix of each row, ``[m * r, 1, ...]``, from those of all prefixes ``[n]``."""
        own = self.own(values)
        rows = own.repeat_interleave(len(self.tensor) // len(own))
        return rows.view(-1, *[1] * (self.tensor.ndim - 1))
