"""Models that prefixfast supports: verified architectures, refused architectures, and refused settings."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prefixfast.errors import ConfigError

# Architectures whose parity with PEFT is tested in tests/parity.
VERIFIED = frozenset(
    {"gpt2", "llama", "qwen2", "qwen3", "mistral", "opt", "gpt_neox", "gemma", "gemma2", "gemma3_text"}
)
OWN_ATTENTION = "it computes attention in its own code, outside transformers' attention interface"
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention", "EncDecAttention")  # modules of several families
# Reasons by model type.
REFUSED = {
    **dict.fromkeys(("gptj", "gpt_neo", "codegen", "falcon", "xglm"), OWN_ATTENTION),
    **dict.fromkeys(("bloom", "mpt"), OWN_ATTENTION + " and needs ALiBi biases"),
}


def check_supported(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if the configuration of a decoder-only model is known to be unsupported."""
    config = model.config
    kind = config.model_type
    reason = None
    if kind in REFUSED:
        reason = REFUSED[kind]
    elif found := cross_attention(model):
        reason = (
            f"it is a part of an encoder-decoder model: {found} attends to an encoder's states, which prefixfast does "
            "not compute"
        )
    elif getattr(config, "reorder_and_upcast_attn", False):
        reason = (
            "config.reorder_and_upcast_attn works with eager attention only; set it to False if the model was not "
            "trained with it in half precision"
        )
    elif getattr(config.get_text_config(), "attention_chunk_size", None):
        reason = "config.attention_chunk_size: prefixfast does not compute chunked attention"
    elif getattr(config, "add_cross_attention", False):
        reason = "config.add_cross_attention needs an encoder's states, which a prefix-tuned decoder does not have"
    elif dynamic := {t for t in _rope_types(config) if t in ("dynamic", "longrope")}:
        reason = (
            f"RoPE type {dynamic.pop()!r} changes with the batch's length, so packed requests would change each "
            "other; use 'default', 'linear' or 'yarn'"
        )
    if reason:
        msg = f"cannot attach {type(model).__name__} ({kind}): {reason}"
        raise ConfigError(msg)


def cross_attention(model: PreTrainedModel) -> str | None:
    """Name of a module that attends to the states of an encoder, None if there is none."""
    return next((name for name, _ in model.named_modules() if name.endswith(CROSS_ATTENTION)), None)


def unsupported_layers(model: PreTrainedModel) -> str:
    """Remark on layers of a kind that prefixfast does not compute, empty if the model names none.

    Args:
        model: Model that cannot be attached.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others:
        return f"; its configuration names layers of the kind {', '.join(others)}, which prefixfast does not compute"
    if getattr(model, "_is_stateful", False):
        return "; its layers keep a recurrent state beside attention, which prefixfast does not compute"
    return ""


def _rope_types(config: Any) -> set[str]:
    """RoPE types of a config; Gemma 3 nests one dictionary per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    return {str(r.get("rope_type", r.get("type", "default"))) for r in nested}
