"""Dense reference of LoRA and a prefix: transformers' own forward with updated weights and rows in its cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefixfast import TunedWeights


def updates(model: PreTrainedModel, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of a model with low-rank updates, by name.

    Args:
        model: Model without adapters.
        tensors: Matrices ``{layer}.lora_A.weight`` and ``{layer}.lora_B.weight`` by name.
        scale: Factor on the updates.
    """
    found = {}
    for name in {n.rsplit(".", 2)[0] for n in tensors}:
        layer = model.get_submodule(name)
        update = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] * scale
        found[f"{name}.weight"] = layer.weight.detach() + (update.T if type(layer) is Conv1D else update)
    return found


def logits(model: PreTrainedModel, weights: Mapping[str, Tensor], kv: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits ``[N, V]`` of one text.

    Args:
        model: Model without adapters.
        weights: Weights that take the place of its own, by name.
        kv: Keys and values ``self.{layer}.k`` and ``self.{layer}.v`` ``[P, H, D]`` by name.
        ids: Token ids ``[N]``.
    """
    rows, n = len(kv["self.0.k"]), len(ids)
    cache = DynamicCache(
        [tuple(kv[f"self.{i}.{x}"].transpose(0, 1)[None] for x in "kv") for i in range(model.config.num_hidden_layers)]
    )
    given = {
        "input_ids": ids[None],
        "past_key_values": cache,
        "attention_mask": torch.ones(1, rows + n, dtype=torch.long),
        "position_ids": torch.arange(rows, rows + n)[None],
    }
    return torch.func.functional_call(model, dict(weights), kwargs=given).logits[0]


def of_tuned(model: PreTrainedModel, tuned: TunedWeights, ids: Tensor) -> Tensor:
    """Logits ``[N, V]`` of one text with trained LoRA and its prefix."""
    assert tuned.prefix is not None
    scale = tuned.options["lora_alpha"] / tuned.options["r"]
    with torch.no_grad():
        return logits(model, updates(model, tuned.tensors, scale), tuned.prefix.kv, ids)
