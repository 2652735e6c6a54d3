"""Tiny random models whose layers differ in their heads, read keys of other layers, or have values of another width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

import tiny

SLIDING, FULL = "sliding_attention", "full_attention"
LAYERS = {
    **tiny.GROUPED,
    "num_hidden_layers": 6,
    "head_dim": 8,
    "sliding_window": tiny.WINDOW,
    "layer_types": [SLIDING, FULL] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": tiny.VOCAB,
}
GEMMA3N = {**LAYERS, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6}
GEMMA4 = {**LAYERS, "global_head_dim": 16}
WIDE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
LATENT = {
    **tiny.TOKENS,
    **tiny.SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "first_k_dense_replace": 9,
}
HEADS = {
    **tiny.GROUPED,
    "head_dim": 8,
    "num_attention_heads_per_layer": [4, 2, 4],
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": tiny.WINDOW,
    "mlp_layer_types": ["dense"] * 3,
}
EXPERTS = {
    **tiny.TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_channels": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 160,
}


def _gemma3n(**fields: Any) -> Callable[[], Any]:
    return lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**{**GEMMA3N, **fields}))


def _gemma4(**fields: Any) -> Callable[[], Any]:
    return lambda: Gemma4ForCausalLM(Gemma4TextConfig(**{**GEMMA4, **fields}))


def _auto(kind: str, **fields: Any) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


# PEFT holds prefixes of these.
WITH_PEFT = {
    "gemma3n, 2 shared": _gemma3n(num_kv_shared_layers=2),
    "gemma3n, 3 shared by one": _gemma3n(
        num_kv_shared_layers=3, layer_types=[SLIDING, SLIDING, FULL, FULL, FULL, FULL]
    ),
    "gemma4, 2 shared": _gemma4(num_kv_shared_layers=2),
    "gemma4, none shared": _gemma4(num_kv_shared_layers=0),
    "gemma4, one head dim": _gemma4(num_kv_shared_layers=2, global_head_dim=8),
    "laguna, fewer heads": _auto("laguna", **HEADS),
}
# PEFT leaves the sliding layers out, which have more heads than its adapter. With the first layer among them, PEFT's
# forward starts the text at position 0, and its `generate` at P.
WIDE_FIRST = "gemma4, wide sliding layers"
SKIPPED = {
    WIDE_FIRST: _gemma4(num_kv_shared_layers=2, **WIDE),
    "gemma4, wide second layer": _gemma4(layer_types=[FULL, SLIDING, FULL, SLIDING, FULL, FULL], **WIDE),
}
# PEFT cannot hold prefixes of these.
WITHOUT_PEFT = {
    "deepseek_v3, one head dim": _auto("deepseek_v3", **LATENT, v_head_dim=16),
    "deepseek_v3, short values": _auto("deepseek_v3", **LATENT, v_head_dim=12),
    "deepseek_v2, long values": _auto("deepseek_v2", **LATENT, v_head_dim=24),
    "minicpm3": _auto("minicpm3", **LATENT, v_head_dim=12),
    "jetmoe": _auto("jetmoe", **EXPERTS),
}
MODELS = {**WITH_PEFT, **SKIPPED, **WITHOUT_PEFT}


def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model with logits far from uniform."""
    return tiny.randomize(MODELS[name], dtype=dtype, seed=seed)
