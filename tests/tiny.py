"""Tiny random models of ten decoder-only families, and PEFT models with a given prefix."""

from __future__ import annotations

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import eager_mask

VOCAB, EOS, WINDOW = 101, 2, 12
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
GROUPED = {**TOKENS, **SIZES, "num_key_value_heads": 2}
GPT2 = {
    **TOKENS,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 160,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
OPT = {**TOKENS, **SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0, "attention_dropout": 0}
OPT.pop("intermediate_size")
GEMMA = {**GROUPED, "head_dim": 16}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, head_dim=8, sliding_window=WINDOW)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TOKENS, **SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GEMMA)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, sliding_window=WINDOW, query_pre_attn_scalar=8)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GEMMA, sliding_window=WINDOW, query_pre_attn_scalar=8, sliding_window_pattern=2)
    ),
}


def make(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model with logits far from uniform, so that rounding does not change the most likely token."""
    model = randomize(FAMILIES[family], dtype=dtype, seed=seed)
    if family == "gemma2":  # only eager attention has its soft cap
        model.set_attn_implementation("eager")
    return model


def randomize(build, *, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A model that ``build`` makes, with noise on its weights."""
    torch.manual_seed(seed)
    model = build().eval().to(dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((torch.randn(p.shape, generator=g) * (0.12 if p.dim() > 1 else 0.02)).to(dtype))
    return model


def peft_table(model, length: int, seed: int, scale: float = 0.7) -> torch.Tensor:
    """A random prefix in PEFT's layout with a strong effect on the logits."""
    from peft import PrefixTuningConfig, get_peft_model

    config = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)).peft_config[
        "default"
    ]
    g = torch.Generator().manual_seed(seed)
    return torch.randn(length, config.num_layers * 2 * config.token_dim, generator=g) * scale


def with_prefix(model, table: torch.Tensor, layers=None):
    """PEFT's model with a prefix.

    Args:
        model: Model that PEFT wraps.
        table: Prefix in PEFT's layout.
        layers: Layers that see each row; the attention of other layers leaves the row out. None for all layers.
    """
    from peft import PrefixTuningConfig, get_peft_model

    if layers is not None:
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.seen_rows = torch.tensor([module.layer_idx in seen for seen in layers])
        model.set_attn_implementation(HIDING)
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(table)))
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.data = table.to(model.dtype).clone()
    return peft.eval()


HIDING = "hiding"


def _hiding(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    """Plain attention without the leading keys for which ``module.seen_rows`` is False."""
    group, rows = module.num_key_value_groups if hasattr(module, "num_key_value_groups") else 1, module.seen_rows
    seen = torch.cat([rows, rows.new_ones(key.shape[2] - len(rows))])
    key, value = (x[:, :, seen].repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    weights = (scores + attention_mask[..., seen]).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register(HIDING, _hiding)
AttentionMaskInterface.register(HIDING, eager_mask)


def shapes(model) -> tuple[int, int]:
    """Number of layers and number of kv heads."""
    config = model.config
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
