"""Prompts of encoder-decoder bases: the text that the encoder reads, and the token that the decoder starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from prefixfast.config import GenerationParams
from prefixfast.data.encode import Ints, kept, special_ids
from prefixfast.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from prefixfast.model.base import Model


def encoder_prompt(model: Model, ids: Ints, params: GenerationParams, index: int) -> Ints:
    """Tokens that the encoder reads: those of the text, cut to ``max_source_length``.

    Args:
        model: Encoder-decoder base.
        ids: Token ids of the text, int32.
        params: Resolved parameters.
        index: Place of the request in the batch, for errors.

    Raises:
        RequestError: If the encoder does not have as many positions.
    """
    assert model.seq2seq is not None
    if params.max_source_length is not None:
        ids = ids[kept(ids, params.max_source_length, special_ids(model))]
    if len(ids) > (most := model.seq2seq.encoder_positions):
        msg = (
            f"request {index}: the encoder reads at most {most} tokens, the text has {len(ids)}; shorten the text, or "
            "generate with max_source_length"
        )
        raise RequestError(msg, index=index)
    return ids


def decoder_prompt(params: GenerationParams, index: int) -> Ints:
    """The decoder's start token, int32 ``[1]``.

    Args:
        params: Resolved parameters.
        index: Place of the request in the batch, for errors.

    Raises:
        RequestError: If neither the request nor its prefix nor the base names one.
    """
    if params.decoder_start_token_id is None:
        msg = (
            f"request {index}: this base names no token from which its decoder starts, since the language of the text "
            "decides it; set decoder_start_token_id to the id of the language"
        )
        raise RequestError(msg, index=index)
    return np.array([params.decoder_start_token_id], np.int32)


def check_decoder_only(model: Model, what: str, reason: str) -> None:
    """Refuse an encoder-decoder base where only decoder-only ones work.

    Args:
        model: Base model.
        what: Name of what works with decoder-only bases alone.
        reason: Reason, and what to use in its place.

    Raises:
        ConfigError: For an encoder-decoder base.
    """
    if model.seq2seq is not None:
        kind = model.hf.config.model_type
        msg = f"{what}: expected a decoder-only base, got an encoder-decoder one ({kind}); {reason}"
        raise ConfigError(msg)


def check_engine_options(model: Model, share_prompts: int) -> None:
    """Refuse options of an engine that an encoder-decoder base cannot have.

    Args:
        model: Base model.
        share_prompts: Option of that name.

    Raises:
        ConfigError: For ``share_prompts`` with an encoder-decoder base.
    """
    if model.seq2seq is not None and share_prompts:
        msg = (
            f"share_prompts={share_prompts}: expected 0 for an encoder-decoder base, whose encoder reads each text in "
            "both directions, so that no two texts share the states of their first tokens; leave share_prompts out"
        )
        raise ConfigError(msg)
