"""Bases with random weights and prefixes with random numbers, for suites whose speed does not depend on the values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from prefixfast.errors import ConfigError, shown
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.prefix_shape import own_layers
from prefixfast.prefix.prefix import Prefix


class Architecture(NamedTuple):
    """Model class, configuration class, configuration fields and description of a random base."""

    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    fields: dict[str, Any]
    description: str


LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
SHAPES = {
    "gpt2": Architecture(GPT2LMHeadModel, GPT2Config, {}, "GPT-2 124M"),
    "llama": Architecture(LlamaForCausalLM, LlamaConfig, LLAMA, "a Llama of 12 layers, width 768, 4 kv heads"),
}
SMALL = {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 8000}


def make(shape: str, dtype: str) -> PreTrainedModel:
    """Base with random weights, of one of `SHAPES`, without an end token."""
    torch.manual_seed(0)
    kind = SHAPES[shape]
    hf: PreTrainedModel = kind.model(kind.config(**kind.fields)).to(DTYPES[dtype]).eval()
    hf.generation_config.pad_token_id = 0
    hf.generation_config.eos_token_id = None
    return hf


def make_small(positions: int) -> tuple[PreTrainedModel, dict[str, int]]:
    """GPT-2 of 6 layers and width 512 with random fp32 weights, without an end token, and its configuration fields."""
    torch.manual_seed(0)
    fields = {**SMALL, "n_positions": positions}
    config = GPT2Config(**fields, bos_token_id=None, eos_token_id=None)  # GPT-2's own ids are beyond the vocabulary
    hf: PreTrainedModel = GPT2LMHeadModel(config).eval()
    hf.generation_config.eos_token_id = None
    return hf, fields


def load_plain(model: str, dtype: str) -> PreTrainedModel:
    """Base of transformers without prefixfast.

    Raises:
        ConfigError: If transformers cannot load the model.
    """
    try:
        hf: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    except (OSError, ValueError) as e:
        msg = f"model: expected a hub id or a folder of a causal language model, {shown(model)} cannot be loaded: {e}"
        raise ConfigError(msg) from e
    return hf


def make_or_load(model: str | None, shape: str, dtype: str) -> tuple[PreTrainedModel, str]:
    """The model named ``model``, or a random base of ``shape`` without one, and its name in reports."""
    if model:
        return load_plain(model, dtype), model
    return make(shape, dtype), f"{SHAPES[shape].description}, random weights"


def random_prefixes(model: Model, length: int, count: int) -> list[Prefix]:
    """``count`` random prefixes of ``length`` rows. Prefix ``i`` is the same in every call."""
    out = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        kv = {
            f"self.{n}.{x}": torch.randn(length, *row, generator=g) * 0.5
            for n in own_layers(model.layers)
            for x, row in zip("kv", model.layers[n].row, strict=True)
        }
        out.append(Prefix(kv, pos_start=length, base=model.fingerprint))
    return out
