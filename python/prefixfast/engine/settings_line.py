"""The settings of a call in one line, which is logged before the work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prefixfast.config import GenerationParams
from prefixfast.engine.sampling_params import BUILT_IN, SAMPLING_FIELDS
from prefixfast.io.text import counted
from prefixfast.model.base import Model, compute_line, display_name

if TYPE_CHECKING:
    from prefixfast.engine.request import Request
    from prefixfast.engine.score_inputs import ScoreRequest

MOST_SHOWN = 3  # different decodings, and prefix lengths, of one call


def generation_settings(model: Model, requests: Sequence[Request]) -> str:
    """Base, dtype, prefixes, decoding and number of requests of `generate`.

    Args:
        model: Base model.
        requests: Requests.
    """
    decodings = dict.fromkeys(decoding(replace(r.params, seed=None)) for r in requests)
    return f"{call_settings(model, requests)}, {_several(decodings)}"


def call_settings(model: Model, requests: Sequence[Request] | Sequence[ScoreRequest]) -> str:
    """Base, dtype, prefixes and number of requests of a call.

    Args:
        model: Base model.
        requests: Requests.
    """
    lengths = {p.digest: p.num_rows for r in requests for p in r.prefixes}
    sizes = _several(dict.fromkeys(str(n) for n in sorted(lengths.values())))
    prefixes = f"{counted(len(lengths), 'prefix', 'prefixes')} of {sizes} rows" if lengths else "no prefix"
    weights = next((r.weights for r in requests if r.weights is not None), None)
    prefixes = prefixes if weights is None else f"weights of method {weights.method}"
    return f"{display_name(model)}, {compute_line(model)}: {counted(len(requests), 'request')}, {prefixes}"


def decoding(params: GenerationParams) -> str:
    """Method of decoding, and the parameters that differ from the built-in ones.

    Args:
        params: Resolved parameters.

    Example:
        >>> decoding(GenerationParams.make(BUILT_IN, num_beams=5, max_new_tokens=100))
        '5 beams, max_new_tokens 100'
    """
    beams = params.num_beams or 1
    method = f"{beams} beams" if beams > 1 else "sampling" if params.do_sample else "greedy"
    left_out: tuple[str, ...] = ("do_sample", "num_beams", "max_new_tokens", "bad_words_ids")
    left_out += () if params.do_sample else SAMPLING_FIELDS
    left_out += () if beams > 1 else ("length_penalty", "early_stopping")
    others = [
        f"{name} {value}"
        for name in GenerationParams.names()
        if name not in left_out and (value := getattr(params, name)) not in (None, getattr(BUILT_IN, name))
    ]
    others += [f"{len(params.bad_words_ids)} bad words"] if params.bad_words_ids else []
    return ", ".join((method, f"max_new_tokens {params.max_new_tokens}", *others))


def _several(texts: Iterable[str]) -> str:
    """Texts joined by "or", the first ones if there are many."""
    found = list(texts)
    more = f" or {len(found) - MOST_SHOWN} others" if len(found) > MOST_SHOWN else ""
    return " or ".join(found[:MOST_SHOWN]) + more
