"""Method ``adapter``: bottleneck adapters after the transformer blocks (Lin, Madotto & Fung 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixfast.model.tuned.adapter import bottleneck_width, new_adapters
from prefixfast.training.methods.weights import WeightsState

if TYPE_CHECKING:
    from prefixfast.training.group_data import GroupData


def make(data: GroupData) -> WeightsState:
    """Initial adapters, with the width whose number of parameters is closest to the wanted share of the base's."""
    model, (job,) = data.model, data.group.jobs
    width = bottleneck_width(model, data.group.method_config.adapter_size)
    tensors = new_adapters(model, width, job.config.seed)
    share = sum(t.numel() for t in tensors.values()) / sum(p.numel() for p in model.hf.parameters())
    return WeightsState(data, "adapter", tensors, {"bottleneck": width, "share": float(f"{share:.4g}")})
