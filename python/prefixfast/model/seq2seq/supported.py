"""Encoder-decoder models that prefixfast supports, and the reasons why it refuses others."""

from __future__ import annotations

from transformers import PreTrainedModel

from prefixfast.errors import ConfigError
from prefixfast.model.seq2seq.families import FAMILIES
from prefixfast.model.supported_models import OWN_ATTENTION

COUPLED_TOKENS = "its router gives each expert a limited number of tokens, so that requests would change each other"
UNPROVEN_CROSS = "its cross-attention is windowed or shares scores with self-attention, which is not shown to be right"
NO_HEAD = "it has no output layer; give the whole model, as AutoModelForSeq2SeqLM loads it"
SPEECH = "it is a model of speech and text, whose stacks are not shown to be right"
REFUSED = {  # reasons by model type
    **dict.fromkeys(("bigbird_pegasus", "fsmt", "led", "longt5", "mvp", "pegasus_x", "prophetnet"), OWN_ATTENTION),
    **dict.fromkeys(("nllb-moe", "switch_transformers"), COUPLED_TOKENS),
    **dict.fromkeys(("t5gemma", "t5gemma2"), UNPROVEN_CROSS),
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), SPEECH),
    "encoder-decoder": "its encoder and its decoder are models of any two kinds",
}


def check_seq2seq_supported(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if an encoder-decoder model is of no supported family."""
    kind, reason = model.config.model_type, None
    if kind not in FAMILIES:
        unknown = f"it is none of the encoder-decoder models {', '.join(sorted(FAMILIES))}"
        reason = REFUSED.get(kind, unknown)
    elif model.get_output_embeddings() is None:
        reason = NO_HEAD
    if reason:
        msg = f"cannot attach {type(model).__name__} ({kind}): {reason}"
        raise ConfigError(msg)
