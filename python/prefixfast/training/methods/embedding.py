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


def make(data: GroupData) -> PrefixState:
    """Initial embeddings of a group.

    Raises:
        ConfigError: If initial values are not those of embeddings, or the results of the base model do not follow from
            embeddings alone.
    """
    model, length = data.model, data.group.prefix_config.length_at("self")
    tables = [_initial_table(data, job.init, job.config.seed) for job in data.group.jobs]
    table = tables[0].to(model.device, model.dtype)
    _, reason = embedded_tensors(model, table, {"pos_start": length})
    if reason is not None:
        msg = f"method 'embedding' does not work with a {type(model.hf).__name__}: {reason}; train a prefix"
        raise ConfigError(msg)
    return PrefixState(data, TrainedPrefixes({"self": EmbeddingParameters(model, tables)}))


@torch.no_grad()
def _initial_table(data: GroupData, init: object, seed: int) -> Tensor:
    """Initial embeddings ``[P, d]`` of one prefix."""
    model, length = data.model, data.group.prefix_config.length_at("self")
    embedding = model.hf.get_input_embeddings()
    if init == "text":
        ids = init_text_ids(model, data.job.init_options)
        made: Tensor = embedding(torch.tensor((ids * length)[:length], device=model.device))
        return made
    if init == "random":
        return torch.randn(length, embedding.weight.shape[1], generator=torch.Generator().manual_seed(seed))
    got = shown(init) if isinstance(init, str) else type(init).__name__
    msg = f"init: method 'embedding' starts with 'text' or 'random', got {got}"
    raise ConfigError(msg)
