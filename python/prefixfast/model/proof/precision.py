"""Weights in fp32 for the time of the proof, where rounding hides no fault."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.model.memory import free_memory

HALF = (torch.bfloat16, torch.float16)
MOST_BYTES = 8 * 2**30  # of the copies; larger models are compared in their own dtype
LIMIT, HALF_LIMIT = 1e-3, 5e-2  # relative errors


@contextlib.contextmanager
def float32_weights(model: PreTrainedModel) -> Iterator[float]:
    """Context manager in which weights in half precision are replaced by copies in fp32, if there is memory.

    Quantized weights are not replaced.

    Args:
        model: Model.

    Yields:
        Largest relative error that is rounding.
    """
    tensors: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    plain = all(type(t.data) is Tensor and (t.is_floating_point() or t.dtype == torch.bool) for t in tensors.values())
    half = [t for t in tensors.values() if t.dtype in HALF]
    size = 4 * sum(t.numel() for t in half)
    if not half:
        yield LIMIT if plain else HALF_LIMIT
        return
    if not plain or size > min(MOST_BYTES, free_memory(model.device) // 2):
        yield HALF_LIMIT
        return
    buffers: list[tuple[dict[str, Any], str, Tensor]] = [
        (m._buffers, name, b)
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None and b.dtype in HALF
    ]
    weights = [(t, t.data) for t in half]
    try:
        for t in half:
            t.data = t.data.float()
        for owner, name, b in buffers:
            owner[name] = b.float()
        yield LIMIT
    finally:
        for t, data in weights:
            t.data = data
        for owner, name, b in buffers:
            owner[name] = b
