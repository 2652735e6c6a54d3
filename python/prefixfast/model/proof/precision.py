"""Weights in fp32 for the time of the proof, where rounding hides no fault."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
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
    weights = {id(p): p for p in model.parameters()}.values()
    plain = all(type(t.data) is Tensor and (t.is_floating_point() or t.dtype == torch.bool) for t in weights)
    size = 4 * sum(t.numel() for t in weights if t.dtype in HALF)
    if not plain or size > min(MOST_BYTES, free_memory(model.device) // 2):
        yield HALF_LIMIT
        return
    # Only this model's modules get the copies: another model, which may compute meanwhile, can have the same tensors.
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (owner, name, t)
        for m in model.modules()
        for owner in (m._parameters, m._buffers)
        for name, t in owner.items()
        if t is not None and t.dtype in HALF
    ]
    copies: dict[int, Tensor] = {}
    try:
        for owner, name, t in places:
            if id(t) not in copies:
                made = t.detach().float()
                copies[id(t)] = nn.Parameter(made, requires_grad=False) if isinstance(t, nn.Parameter) else made
            owner[name] = copies[id(t)]
        yield LIMIT
    finally:
        for owner, name, t in places:
            owner[name] = t
