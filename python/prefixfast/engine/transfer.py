"""Copies of small arrays between host and device that do not make the host wait until a value is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.integer], device: torch.device) -> Tensor:
    """Int64 copy of an array on the device."""
    host = torch.from_numpy(values).long()
    # A copy from pageable memory would wait for all earlier work of the device.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class HostCopy:
    """Copy of a tensor to the host, started at once and read later.

    Args:
        source: Tensor to copy. Work that is started later may overwrite it.
    """

    def __init__(self, source: Tensor) -> None:
        cuda = source.device.type == "cuda"
        self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=cuda).copy_(source, non_blocking=True)
        self.event = torch.cuda.current_stream(source.device).record_event() if cuda else None

    def values(self) -> list[Any]:
        """Wait for the copy, but for no work that was started later.

        Returns:
            Numbers, or rows of numbers, as `Tensor.tolist` gives them.
        """
        if self.event is not None:
            self.event.synchronize()
        values: list[Any] = self.host.tolist()
        return values
