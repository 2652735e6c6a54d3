"""`seq2seq_facts`, the tokens and positions of a loaded encoder-decoder model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from prefixfast.errors import ConfigError, shown
from prefixfast.model.seq2seq.families import FAMILIES
from prefixfast.model.seq2seq.family import UNBOUNDED
from prefixfast.model.seq2seq.tokens import Seq2Seq


def seq2seq_facts(model: PreTrainedModel) -> Seq2Seq:
    """Tokens and positions of an attached encoder-decoder model, by its generation config and its config.

    Raises:
        ConfigError: If the model has no start token and its labels do not say one, or if a token is not one id.
    """
    family = FAMILIES[model.config.model_type]
    start, pad = _token(model, "decoder_start_token_id"), _token(model, "pad_token_id")
    if pad is None or (start is None and not family.wraps):
        missing = "pad_token_id" if pad is None else "decoder_start_token_id"
        msg = f"{_name(model)}: expected {missing} in its generation config or its config, got None"
        raise ConfigError(msg)
    vocab_size = len(model.get_decoder().embed_tokens.weight)
    if start is not None and not 0 <= start < vocab_size:
        msg = f"{_name(model)}: decoder_start_token_id: expected a token id below {vocab_size}, got {start}"
        raise ConfigError(msg)
    return Seq2Seq(
        start,
        family.wraps,
        pad,
        vocab_size,
        family.positions(model.get_encoder()),
        family.has_distances,
        family.skips_pads,
    )


def config_facts(config: PretrainedConfig) -> Seq2Seq:
    """Tokens and positions of an encoder-decoder model by its config alone, for checks of rows without the weights.

    Raises:
        ConfigError: If prefixfast does not compute models of its type.
    """
    if (family := FAMILIES.get(config.model_type)) is None:
        expected = f"expected an encoder-decoder model among {', '.join(FAMILIES)}"
        msg = f"model: {expected}, got the type {shown(config.model_type)}"
        raise ConfigError(msg)
    pad: int = next((i for i in (config.pad_token_id, config.eos_token_id) if isinstance(i, int)), 0)
    start = getattr(config, "decoder_start_token_id", None)
    return Seq2Seq(
        pad if start is None else start,
        family.wraps,
        pad,
        int(getattr(config, "decoder_vocab_size", None) or config.vocab_size),
        UNBOUNDED if family.has_distances else int(config.max_position_embeddings),
        family.has_distances,
        family.skips_pads,
    )


def _token(model: PreTrainedModel, name: str) -> int | None:
    """Token id of the generation config, else of the config; None if neither has it."""
    found: Any = getattr(getattr(model, "generation_config", None), name, None)
    found = getattr(model.config, name, None) if found is None else found
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if found is not None and type(found) is not int:
        msg = f"{_name(model)}: {name}: expected one token id, got {shown(found)}"
        raise ConfigError(msg)
    return found


def _name(model: PreTrainedModel) -> str:
    return f"cannot attach {type(model).__name__} ({model.config.model_type})"
