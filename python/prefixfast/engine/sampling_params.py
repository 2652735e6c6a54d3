"""How a request's parameters are found: call > request > prefix > the base's generation_config > built-in, checked before any work."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefixfast.config import GenerationParams
from prefixfast.config.generation import FEW
from prefixfast.data.encode import request_error
from prefixfast.errors import ConfigError, RequestError
from prefixfast.model.base import Model

logger = logging.getLogger(__name__)
BUILT_IN = GenerationParams(
    max_new_tokens=256, min_new_tokens=0, num_beams=1, do_sample=False, temperature=1.0, top_k=50, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
    no_repeat_ngram_size=0, bad_words_ids=(), stop_strings=(), length_penalty=1.0, early_stopping=False, num_return_sequences=1,
)  # fmt: skip
MOST_NEW_TOKENS, MOST_BEAMS = 4096, 64  # caps for values that come from files
NOTHING = GenerationParams()
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


# Fields of a generation_config that change results and are not honoured, with their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
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


def warn_about_defaults(model: Model) -> None:
    """Name what the base's generation_config asks for and this engine does not do."""
    config = getattr(model.hf, "generation_config", None)
    unheeded = {n: v for n, neutral in NEUTRAL.items() if (v := getattr(config, n, None)) not in neutral}
    if unheeded:
        logger.warning(
            "not honoured from the base's generation_config: %s",
            ", ".join(f"{n}={v!r:.40}" for n, v in unheeded.items()),
        )


def base_defaults(model: Model) -> GenerationParams:
    """What the base's generation_config says, within caps."""
    config = getattr(model.hf, "generation_config", None)
    found = {n: v for n in GenerationParams.names() if (v := getattr(config, n, None)) is not None}
    for name, value in list(found.items()):
        try:
            GenerationParams(**{name: value})
        except ConfigError as e:
            logger.warning("not taken from the base's generation_config: %s", e)
            del found[name]
    return _capped(GenerationParams(**found)) if found else NOTHING


def _capped(p: GenerationParams) -> GenerationParams:
    return GenerationParams.make(
        p,
        max_new_tokens=None if p.max_new_tokens is None else min(p.max_new_tokens, MOST_NEW_TOKENS),
        num_beams=None if p.num_beams is None else min(p.num_beams, MOST_BEAMS),
        num_return_sequences=None if p.num_return_sequences is None else min(p.num_return_sequences, MOST_BEAMS),
    )


def resolve(
    item: Any,
    index: int,
    decodings: list[Mapping[str, Any]],
    call: GenerationParams,
    inherited: GenerationParams,
    prompt: int,
    limit: int,
) -> GenerationParams:
    """Call > request > prefix > base > built-in; a length that nobody asked for here is cut to what fits."""
    with request_error(index):
        own = item.get("params") if isinstance(item, Mapping) else None
        asked = call if own is None else call.over(GenerationParams.make(own))
        if (asked.num_beams or 1) > 1 and asked.do_sample:
            msg = f"do_sample with num_beams={asked.num_beams}: beams are searched, not drawn; leave one of them out"
            raise ConfigError(msg)
        loaded = inherited
        for decoding in filter(None, decodings):
            loaded = _capped(GenerationParams.make(dict(decoding))).over(loaded)
    params = asked.over(loaded).over(BUILT_IN)
    if (params.num_beams or 1) > 1 and params.do_sample:
        msg = f"request {index}: prefix or base ask for {params.num_beams} beams that sample, which is not done here: say num_beams=1 or do_sample=False"
        raise RequestError(msg, index=index)
    if not params.do_sample and (idle := [n for n in SAMPLING if getattr(asked, n) is not None]):
        msg = f"request {index}: {idle[0]}={getattr(asked, idle[0])!r} has no effect without do_sample=True"
        raise RequestError(msg, index=index)
    room = limit - prompt
    if room < 1 or (asked.max_new_tokens or 0) > room:
        new = asked.max_new_tokens or "at least 1"
        msg = f"request {index}: {prompt} prompt tokens and {new} new ones exceed the limit of {limit}; shorten the prompt or lower max_new_tokens"
        raise RequestError(msg, index=index)
    assert params.max_new_tokens is not None
    most = min(params.max_new_tokens, room)
    least = min(params.min_new_tokens or 0, most)
    return (
        _limited(params, most, least)
        if len(params.bad_words_ids or ()) < FEW
        else _limited.__wrapped__(params, most, least)
    )


@functools.lru_cache(512)
def _limited(params: GenerationParams, most: int, least: int) -> GenerationParams:
    return replace(params, max_new_tokens=most, min_new_tokens=least)


def check_params(params: GenerationParams, index: int, vocab_size: int) -> None:
    """Refuse combinations that would be dropped in silence."""
    check = _wrong if len(params.bad_words_ids or ()) < FEW else _wrong.__wrapped__
    if (wrong := check(replace(params, seed=None) if params.seed is not None else params, vocab_size)) is not None:
        msg = f"request {index}: {wrong}"
        raise RequestError(msg, index=index)


@functools.lru_cache(512)
def _wrong(p: GenerationParams, vocab_size: int) -> str | None:
    beams, texts = p.num_beams or 1, p.num_return_sequences or 1
    top = max((i for word in p.bad_words_ids or () for i in word), default=0)
    found = {
        f"num_return_sequences={texts}: the likeliest text is one; say do_sample=True or num_beams={texts}": texts > 1
        and beams == 1
        and not p.do_sample,
        f"num_return_sequences={texts} of {beams} beams: expected at most as many": beams > 1 and texts > beams,
        "stop_strings with beams: beams are cut by tokens; use num_beams=1": beams > 1 and p.stop_strings,
        "logprobs with beams: beams change places; use num_beams=1, or score the result": beams > 1
        and p.logprobs is not None,
        f"logprobs={p.logprobs}: expected at most the vocabulary's {vocab_size}": (p.logprobs or 0) > vocab_size,
        f"bad_words_ids: expected token ids below {vocab_size}, got {top}": top >= vocab_size,
    }
    return next((text for text, holds in found.items() if holds), None)
