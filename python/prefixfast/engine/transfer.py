"""Small arrays between host and device that never make the host wait for the device's work, but where a value is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.integer], device: torch.device) -> Tensor:
    """int64 on the device; through pinned memory, since a copy from any other waits for all earlier work."""
    host = torch.from_numpy(values).long()
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Arriving:
    """A copy of a tensor on its way to the host.

    Args:
        source: May be overwritten by later work.
    """

    def __init__(self, source: Tensor) -> None:
        cuda = source.device.type == "cuda"
        self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=cuda).copy_(source, non_blocking=True)
        self.event = torch.cuda.current_stream(source.device).record_event() if cuda else None

    def values(self) -> list[Any]:
        """Wait for it, and for nothing that was started later; a list of numbers, or of rows of them."""
        if self.event is not None:
            self.event.synchronize()
        out: list[Any] = self.host.tolist()
        return out
