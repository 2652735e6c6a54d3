"""Generation parameters of a request: where they come from, and checks before any work.

The order of precedence is call, request, prefix, the base model's ``generation_config``, and the built-in defaults.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prefixfast.config import GenerationParams
from prefixfast.config.generation import CACHED_LENGTH
from prefixfast.config.json_types import JSON
from prefixfast.data.encode import request_error
from prefixfast.errors import ConfigError, RequestError, shown

if TYPE_CHECKING:
    from prefixfast.model.base import Model

logger = logging.getLogger(__name__)
BUILT_IN = GenerationParams(
    max_new_tokens=256,
    min_new_tokens=0,
    num_beams=1,
    do_sample=False,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    no_repeat_ngram_size=0,
    encoder_no_repeat_ngram_size=0,
    bad_words_ids=(),
    forced_bos_token_id=-1,
    forced_eos_token_id=-1,
    stop_strings=(),
    length_penalty=1.0,
    early_stopping=False,
    num_return_sequences=1,
)
MAX_LOADED_NEW_TOKENS, MAX_LOADED_BEAMS = 4096, 64  # limits of values that come from files
LOG_FP32_MAX = 88.0  # logarithm of the largest number of fp32
UNSET = GenerationParams()
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed")


# Fields of a generation_config that change results and are not supported, with the values that switch them off.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "num_beam_groups": (None, 1),
    "sequence_bias": (None,),
}
# Those that decoding has for encoder-decoder bases.
SEQ2SEQ_SUPPORTED = ("forced_bos_token_id", "forced_eos_token_id", "min_length")
# Parameters of encoder-decoder bases, with the values that ask for nothing.
SEQ2SEQ_ONLY: dict[str, tuple[int | None, ...]] = {
    "forced_bos_token_id": (None, -1),
    "forced_eos_token_id": (None, -1),
    "decoder_start_token_id": (None,),
    "max_source_length": (None,),
}


@dataclass(frozen=True)
class ParamSources:
    """Sources of a request's generation parameters, in the order of precedence.

    Attributes:
        call: Parameters of the call.
        request: Parameters of the request, the ``params`` of a row; None for a request without them.
        prefixes: Default parameters of the request's prefixes. The last prefix takes precedence.
        base: Parameters of the base model's ``generation_config``.
    """

    call: GenerationParams
    request: JSON
    prefixes: Sequence[Mapping[str, Any]]
    base: GenerationParams


def warn_unsupported_defaults(model: Model) -> None:
    """Log a warning with the unsupported fields of the base model's ``generation_config`` that change results."""
    config = getattr(model.hf, "generation_config", None)
    supported = SEQ2SEQ_SUPPORTED if model.seq2seq is not None else ()
    values = {n: getattr(config, n, None) for n in UNSUPPORTED if n not in supported}
    found = {n: v for n, v in values.items() if v not in UNSUPPORTED[n]}
    if found:
        fields = ", ".join(f"{n}={shown(v)}" for n, v in found.items())
        logger.warning("fields of the base model's generation_config that are not supported: %s", fields)


def base_defaults(model: Model) -> GenerationParams:
    """Parameters of the base model's ``generation_config``, within limits.

    An invalid value is ignored with a warning.
    """
    config = getattr(model.hf, "generation_config", None)
    found = {n: v for n in GenerationParams.names() if (v := getattr(config, n, None)) is not None}
    found = {n: v for n, v in found.items() if n not in SEQ2SEQ_ONLY}
    if model.seq2seq is not None:
        found = _seq2seq_defaults(model, config) | found
    for name, value in list(found.items()):
        try:
            GenerationParams(**{name: value})
        except ConfigError as e:
            logger.warning("invalid value in the base model's generation_config is ignored: %s", e)
            del found[name]
    return _limited(GenerationParams(**found)) if found else UNSET


def num_output_tokens(model: Model) -> int:
    """Number of tokens that a base model can generate."""
    return model.vocab_size if model.seq2seq is None else model.seq2seq.vocab_size


def _seq2seq_defaults(model: Model, config: Any) -> dict[str, Any]:
    """Defaults of an encoder-decoder base under the names of `GenerationParams`, those that it does not give left out.

    Its lengths count the decoder's start token.
    """
    start = getattr(config, "decoder_start_token_id", None)
    found = {
        "max_new_tokens": _one_less(getattr(config, "max_length", None)),
        "min_new_tokens": _one_less(getattr(config, "min_length", None)),
        "forced_bos_token_id": getattr(config, "forced_bos_token_id", None),
        "forced_eos_token_id": _only_id(getattr(config, "forced_eos_token_id", None)),
        "decoder_start_token_id": getattr(model.hf.config, "decoder_start_token_id", None) if start is None else start,
    }
    return {name: value for name, value in found.items() if value is not None}


def _one_less(length: Any) -> Any:
    """Number of new tokens of a length that counts the start token; a value that is no length unchanged."""
    return max(0, length - 1) if type(length) is int else length


def _only_id(ids: Any) -> Any:
    """The id of a list of one; other values unchanged."""
    return ids[0] if isinstance(ids, list) and len(ids) == 1 else ids


def _limited(p: GenerationParams) -> GenerationParams:
    """Parameters from a file with lengths and numbers of beams cut to the limits."""
    return GenerationParams.make(
        p,
        max_new_tokens=None if p.max_new_tokens is None else min(p.max_new_tokens, MAX_LOADED_NEW_TOKENS),
        num_beams=None if p.num_beams is None else min(p.num_beams, MAX_LOADED_BEAMS),
        num_return_sequences=None if p.num_return_sequences is None else min(p.num_return_sequences, MAX_LOADED_BEAMS),
    )


def given_params(sources: ParamSources, index: int) -> tuple[GenerationParams, GenerationParams]:
    """Parameters that the call and the request ask for, and those that prefixes and base model have as defaults.

    Args:
        sources: Sources of the parameters.
        index: Place of the request in the batch, for errors.

    Raises:
        RequestError: If a source is invalid, or call and request contradict each other.
    """
    with request_error(index):
        own: Any = sources.request  # `make` checks the type
        if isinstance(own, str):
            expected = "params: expected options of generation as a mapping (in a table as JSON)"
            msg = f"{expected}, got {shown(own)}; remove or rename the column if it holds no such options"
            raise ConfigError(msg)
        asked = sources.call if own is None else sources.call.over(GenerationParams.make(own))
        if (asked.num_beams or 1) > 1 and asked.do_sample:
            msg = f"do_sample=True with num_beams={asked.num_beams}: beam search does not sample; remove one of them"
            raise ConfigError(msg)
        loaded = sources.base
        for decoding in filter(None, sources.prefixes):
            loaded = _limited(GenerationParams.make(dict(decoding))).over(loaded)
    return asked, loaded


def resolve_params(
    sources: ParamSources, index: int, prompt_len: int, limit: int, *, has_encoder: bool = False
) -> GenerationParams:
    """Parameters of a request, with every field that has a built-in default set.

    A ``max_new_tokens`` that neither call nor request gives is cut to what fits.

    Args:
        sources: Sources of the parameters.
        index: Place of the request in the batch, for errors.
        prompt_len: Number of prompt tokens.
        limit: Largest number of prompt and generated tokens.
        has_encoder: Whether the prompt is the decoder's start token.

    Raises:
        RequestError: If the parameters are invalid, contradict each other, or ask for more tokens than fit.
    """
    asked, loaded = given_params(sources, index)
    params = asked.over(loaded).over(BUILT_IN)
    if (params.num_beams or 1) > 1 and params.do_sample:
        msg = (
            f"request {index}: the defaults of prefix or base model ask for {params.num_beams} beams that sample, "
            "which is not supported; set num_beams=1 or do_sample=False"
        )
        raise RequestError(msg, index=index)
    if not params.do_sample and (unused := [n for n in SAMPLING_FIELDS if getattr(asked, n) is not None]):
        msg = f"request {index}: {unused[0]}={shown(getattr(asked, unused[0]))} has no effect without do_sample=True"
        raise RequestError(msg, index=index)
    room = limit - prompt_len
    if room < 1 or (asked.max_new_tokens or 0) > room:
        new = asked.max_new_tokens or "at least 1"
        prompt = "the decoder's start token" if has_encoder else f"{prompt_len} prompt tokens"
        advice = "lower max_new_tokens" if has_encoder else "shorten the prompt or lower max_new_tokens"
        msg = f"request {index}: {prompt} and {new} new ones exceed the limit of {limit}; {advice}"
        raise RequestError(msg, index=index)
    assert params.max_new_tokens is not None
    most = min(params.max_new_tokens, room)
    least = min(params.min_new_tokens or 0, most)
    cached = len(params.bad_words_ids or ()) < CACHED_LENGTH
    return (_with_lengths if cached else _with_lengths.__wrapped__)(params, most, least)


@functools.lru_cache(512)
def _with_lengths(params: GenerationParams, most: int, least: int) -> GenerationParams:
    return replace(params, max_new_tokens=most, min_new_tokens=least)


def check_params(params: GenerationParams, index: int, model: Model) -> None:
    """Refuse parameters that do not work with each other or with the base model.

    Args:
        params: Resolved parameters.
        index: Place of the request in the batch, for errors.
        model: Base model.

    Raises:
        RequestError: For such parameters.
    """
    find = _conflict if len(params.bad_words_ids or ()) < CACHED_LENGTH else _conflict.__wrapped__
    unseeded = replace(params, seed=None) if params.seed is not None else params
    conflict = find(unseeded, num_output_tokens(model), encoder_decoder=model.seq2seq is not None)
    if conflict is not None:
        msg = f"request {index}: {conflict}"
        raise RequestError(msg, index=index)


@functools.lru_cache(512)
def _conflict(p: GenerationParams, vocab_size: int, *, encoder_decoder: bool) -> str | None:
    """Error message for parameters that do not work, None if all work."""
    beams, texts = p.num_beams or 1, p.num_return_sequences or 1
    largest = max((i for word in p.bad_words_ids or () for i in word), default=0)
    several = texts > 1 and beams == 1 and not p.do_sample
    unknown = {
        f"{name}: expected a token id below {vocab_size}, got {value}": (value or 0) >= vocab_size
        for name in ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id")
        for value in [getattr(p, name)]
    }
    without_encoder = {
        f"{name}={value}: expected an encoder-decoder base, got a decoder-only one; remove {name}": not encoder_decoder
        and value not in neutral
        for name, neutral in SEQ2SEQ_ONLY.items()
        for value in [getattr(p, name)]
    }
    conflicts = without_encoder | {
        f"num_return_sequences={texts}: greedy search has one text; set do_sample=True or num_beams={texts}": several,
        f"num_return_sequences={texts}: expected at most num_beams={beams}": beams > 1 and texts > beams,
        "stop_strings with beams are not supported; set num_beams=1": beams > 1 and p.stop_strings,
        "logprobs with beams are not supported; set num_beams=1, or score the result": beams > 1
        and p.logprobs is not None,
        f"logprobs={p.logprobs}: expected at most the {vocab_size} tokens of the vocabulary": (p.logprobs or 0)
        > vocab_size,
        f"length_penalty={p.length_penalty}: max_new_tokens={p.max_new_tokens} to this power is beyond fp32": beams > 1
        and abs(p.length_penalty or 0) * math.log(p.max_new_tokens or 1) > LOG_FP32_MAX,
        f"bad_words_ids: expected token ids below {vocab_size}, got {largest}": largest >= vocab_size,
    }
    return next((text for text, holds in (conflicts | unknown).items() if holds), None)
