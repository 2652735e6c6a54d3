"""Method ``lora``: low-rank updates of linear layers (Hu et al. 2021), made and computed by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixfast.model.tuned.lora import new_lora
from prefixfast.training.methods.weights import WeightsState

if TYPE_CHECKING:
    from prefixfast.training.group_data import GroupData


def make(data: GroupData) -> WeightsState:
    """Initial LoRA layers, those of PEFT with the same seed."""
    config, (job,) = data.group.method_config, data.group.jobs
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return WeightsState(data, *new_lora(data.model, config.lora_rank, alpha, job.config.seed))
