"""Tiny random models of every causal-LM type of the installed transformers.

A model's configuration switches on what its class has: sliding windows on some layers, soft caps, biases and layers
that share keys.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, EOS, WINDOW, LAYERS = 101, 2, 12, 4
LARGEST = 5_000_000  # parameters of a model
# Values by the names that configurations give them. A configuration gets those that it knows.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "n_inner", "d_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 160),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "mamba_n_groups"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(
        ("mlp_hidden_size", "shared_intermediate_size", "block_ff_dim", "dim_ff", "dense_intermediate_size"), 48
    ),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "head_dim", "dim_head", "mamba_d_state"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "mamba_n_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("laurel_rank", "mamba_d_conv", "prompt_types"), 4),
    "encoder_ffn_dim": 48,
    "conv_L_cache": 3,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
    "full_attention_interval": 2,
    "num_kv_shared_layers": 1,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "is_decoder": True,
    "attention_bias": True,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    **{
        f"{part}_{name}": 0.0
        for part in (
            "activation",
            "attention",
            "hidden",
            "attn",
            "embd",
            "resid",
            "residual",
            "classifier",
            "embedding",
        )
        for name in ("dropout", "pdrop", "dropout_prob")
    },
    **dict.fromkeys(("dropout", "layerdrop", "attention_probs_dropout_prob", "ffn_dropout"), 0.0),
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 100,
    "ple_embed_dim": 32,
    "hc_lowrank": 4,
}
BYTES = {
    "hidden_size": 32,
    "hidden_size_global": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_hidden_layers": 2,
}
INKLING = {
    "sliding_window_size": WINDOW,
    "rel_extent": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
SHARED = {"layer_types": ALTERNATING, "num_kv_shared_layers": 2}
DOTS = {
    "num_key_value_heads": 4,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention makes keys and values for every head
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2, "num_expert_group": 1}
# Values by model type that differ from `SIZES`. None leaves a value to the configuration's default.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT),
    **dict.fromkeys(("longcat_flash", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), SHARED),
    "axk2": LATENT,
    "bailing_hybrid": LINEAR | {"layer_types": ["linear_attention", "full_attention"] * 2, "mlp_layer_types": None},
    "blt": {
        "vocab_size": None,
        "encoder_hash_byte_group_vocab": VOCAB,
        **dict.fromkeys(("patcher_config", "encoder_config", "decoder_config"), BYTES),
        "global_config": BYTES | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": DOTS | {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "dots3_note_text": DOTS,
    "ernie4_5_moe": {"moe_k": 2, "moe_num_shared_experts": 1},
    "falcon": {"head_dim": None},
    "gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4},
    "git": {"vision_config": VISION},
    "got_ocr2": {"vision_config": VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    **dict.fromkeys(("inkling_text", "inkling2_text"), INKLING),
    "internlm3": {"attention_bias": False},
    "kimi_linear": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "moss_transcribe_diarize": {
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_source_positions": 8,
        }
    },
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "phi4_multimodal": {"vision_config": VISION, "audio_config": VISION},
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), QWEN4),
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"] * 2,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "xlm": {"emb_dim": 32, "causal": True},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"embedding_dim": 32, "num_blocks": LAYERS, "v_head_dim": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "adapter_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}
TEXT = {"moss_transcribe_diarize": "qwen3"}  # types of text models that a default configuration does not name
# Types that are not built, with the reason.
NOT_BUILT = {
    "gemma3n": "its vision model needs the library timm",
    "gemma4_assistant": "transformers 5.23 raises an error for every configuration of it",
    "gemma4_unified_assistant": "transformers 5.23 raises an error for every configuration of it",
}


def make_config(kind: str, **own: Any) -> PretrainedConfig:
    """Configuration of a tiny model of a type.

    Args:
        kind: Model type.
        own: Values that differ from `SIZES`.
    """
    outer, values = CONFIG_MAPPING[kind], {**OWN.get(kind, {}), **own}
    part = next((name for name in ("text_config", "decoder") if name in getattr(outer, "sub_configs", {})), None)
    if part is None:
        return outer(**known(outer, values))
    text = CONFIG_MAPPING[TEXT[kind]] if kind in TEXT else type(getattr(outer(), part))
    inner = text(**known(text, {k: v for k, v in values.items() if k not in PARTS}))
    if part == "decoder":  # the causal LM is the decoder alone
        return inner
    return outer(text_config=inner.to_dict(), **{k: v for k, v in values.items() if k in PARTS})


PARTS = ("vision_config", "audio_config", "mm_tokens_per_image")  # values of the outer configuration


def known(config: type[PretrainedConfig], own: dict[str, Any]) -> dict[str, Any]:
    """Values of `SIZES` and ``own`` that a class of configurations knows."""
    default = config()
    names, aliases = set(dir(default)) | set(vars(default)), getattr(default, "attribute_map", {}) or {}
    values = {k: v for k, v in SIZES.items() if k in names and k not in own and aliases.get(k, k) == k}
    return values | {k: v for k, v in own.items() if v is not None}


def make(kind: str, *, dtype: torch.dtype = torch.float32, **own: Any) -> PreTrainedModel:
    """A random model of a type, with logits that depend on the text.

    Args:
        kind: Model type.
        dtype: Dtype of the weights.
        own: Values of the configuration that differ from `SIZES`.
    """
    config, build = make_config(kind, **own), getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    if not isinstance(config, build.config_class):
        config = config.get_text_config()
    with torch.device("meta"):
        size = sum(p.numel() for p in build(config).parameters())
    assert size < LARGEST, f"{kind} has {size} parameters: OWN must name the values that make it small"
    torch.manual_seed(0)
    model = build(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nan_to_num(p, 0.01))
            p.add_((torch.randn(p.shape, generator=g) * (0.12 if p.dim() > 1 else 0.02)).to(p.dtype))
    return model.eval().to(dtype)
