"""Method ``lora``: low-rank updates of linear layers (Hu et al. 2021), made and computed by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixfast.config.json_types import JSON
from prefixfast.model.tuned.lora import new_lora
from prefixfast.training.methods.weights import WeightsState

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.training.group_data import GroupData


def make(data: GroupData) -> WeightsState:
    """Initial LoRA layers, those of PEFT with the same seed."""
    return WeightsState(data, "lora", *initial_lora(data))


def initial_lora(data: GroupData) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Initial tensors of a group of one name, and the fields of their configuration."""
    config, (job,) = data.group.method_config, data.group.jobs
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    own: dict[str, JSON] = {"r": config.lora_rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    return new_lora(data.model, own if data.job.lora is None else data.job.lora, job.config.seed)
