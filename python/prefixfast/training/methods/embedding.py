"""Method ``embedding``: embeddings of virtual tokens, of many prefixes in the same batches.

The result is a prefix, the keys and values of the embeddings.

Source:
    Lester et al. 2021 (arXiv:2104.08691); the embedding-only ablation of Li & Liang 2021, section 7.2. The random
    initial values are those of PEFT's PROMPT_TUNING, standard normal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefixfast.errors import ConfigError, shown
from prefixfast.prefix.virtual_tokens import embedded_tensors
from prefixfast.training.embeddings import EmbeddingParameters
from prefixfast.training.init import init_text_ids
from prefixfast.training.methods.prefix import PrefixState
from prefixfast.training.prefix_sites import TrainedPrefixes

if TYPE_CHECKING:
    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob


def make(data: GroupData) -> PrefixState:
    """Initial embeddings of a group.

    Raises:
        ConfigError: If initial values are not those of embeddings, or the results of the base model do not follow from
            embeddings alone.
    """
    model, jobs = data.model, data.group.jobs
    blocks = []
    for numbers in data.group.blocks():
        tables = [_initial_table(data, jobs[i]) for i in numbers]
        _, reason = embedded_tensors(model, tables[0].to(model.device, model.dtype), {"pos_start": len(tables[0])})
        if reason is not None:
            msg = f"method 'embedding' does not work with a {type(model.hf).__name__}: {reason}; train a prefix"
            raise ConfigError(msg)
        blocks.append(TrainedPrefixes(numbers, {"self": EmbeddingParameters(model, tables)}))
    return PrefixState(data, blocks)


@torch.no_grad()
def _initial_table(data: GroupData, job: PrefixJob) -> Tensor:
    """Initial embeddings ``[P, d]`` of one prefix."""
    model, init, length = data.model, job.init, job.prefix_config.length_at("self")
    embedding = model.hf.get_input_embeddings()
    if init == "text":
        ids = init_text_ids(model, data.job.init_options)
        made: Tensor = embedding(torch.tensor((ids * length)[:length], device=model.device))
        return made
    if init == "random":
        return torch.randn(length, embedding.weight.shape[1], generator=torch.Generator().manual_seed(job.config.seed))
    got = shown(init) if isinstance(init, str) else type(init).__name__
    msg = f"init: method 'embedding' starts with 'text' or 'random', got {got}"
    raise ConfigError(msg)
