"""`GenerationParams`: how tokens are chosen."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from prefixfast.config.options import Options, at_least, option
from prefixfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerationParams(Options):
    """How text is chosen; None inherits: call > request > prefix > the base's generation_config > greedy, 256 new tokens.

    Example:
        >>> GenerationParams(num_beams=3).over(GenerationParams(max_new_tokens=9, num_beams=2)).num_beams
        3
        >>> GenerationParams.make(max_tokens=9)
        Traceback (most recent call last):
        prefixfast.errors.ConfigError: GenerationParams: unknown option 'max_tokens'; did you mean max_new_tokens?
    """

    max_new_tokens: int | None = option(None, "most tokens to generate")
    min_new_tokens: int | None = option(None, "no end token before this many")
    num_beams: int | None = option(None, "beams; 1 is greedy or sampling")
    do_sample: bool | None = option(None, "draw tokens instead of taking the likeliest")
    temperature: float | None = option(None, "divides the logits before a token is drawn")
    top_k: int | None = option(
        None, "draw among the k likeliest tokens; 0: among all. transformers' default, 50, is ours"
    )
    top_p: float | None = option(None, "draw among the likeliest tokens that together have this probability")
    min_p: float | None = option(None, "draw among tokens at least this share as likely as the likeliest")
    repetition_penalty: float | None = option(
        None, "divides positive and multiplies negative logits of tokens that the prompt or the text has"
    )
    no_repeat_ngram_size: int | None = option(
        None, "no n tokens in a row may come twice, the prompt included; 0: they may"
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = option(None, "sequences of token ids that may not come")
    stop_strings: tuple[str, ...] | None = option(
        None, "the text ends with the first of these that comes, which stays in it"
    )
    length_penalty: float | None = option(None, "exponent of the length that divides a beam's score")
    early_stopping: Literal[True, False, "never"] | None = option(
        None, "when a beam search may stop, as transformers defines it"
    )
    num_return_sequences: int | None = option(None, "texts of a request: the best beams, or several samples")
    seed: int | None = option(None, "of the drawn tokens: with it a request's text is the same alone and in any batch")
    logprobs: int | None = option(
        None, "report the log-probability of each token and of this many likeliest ones (before any rule)"
    )

    def __post_init__(self) -> None:
        for name, inner in (("bad_words_ids", True), ("stop_strings", False)):  # lists come from JSON and from users
            value: Any = getattr(self, name)
            if isinstance(value, str) and not inner:
                value = (value,)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(tuple(v) if inner and isinstance(v, list) else v for v in value))
        super().__post_init__()

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        at_least(
            self,
            max_new_tokens=1,
            min_new_tokens=0,
            num_beams=1,
            top_k=0,
            no_repeat_ngram_size=0,
            num_return_sequences=1,
            seed=0,
            logprobs=0,
        )
        for name, fits, expected in (
            ("temperature", lambda x: x >= 1e-6, "at least 1e-6 (for the likeliest token say do_sample=False)"),
            ("seed", lambda x: x < 2**62, "less than 2**62"),
            ("top_k", lambda x: x < 2**31, "less than 2**31"),
            ("repetition_penalty", lambda x: x > 0, "more than 0"),
            ("top_p", lambda x: 0 < x <= 1, "more than 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "0 to 1"),
            (
                "bad_words_ids",
                lambda x: all(isinstance(w, tuple) and w and all(type(i) is int and i >= 0 for i in w) for w in x),
                "lists of token ids",
            ),
            ("stop_strings", lambda x: all(isinstance(s, str) and s for s in x), "strings that are not empty"),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                msg = f"GenerationParams.{name}: expected {expected}, got {value!r}"
                raise ConfigError(msg)

    def over(self, fallback: GenerationParams) -> GenerationParams:
        """`GenerationParams` with these values where given, those of ``fallback`` elsewhere.

        Beams and sampling exclude each other, so what is given here ends the other one there.
        """
        few = all(
            len(p.bad_words_ids or ()) + len(p.stop_strings or ()) < FEW for p in (self, fallback)
        )  # big ones are not kept
        return _over(self, fallback) if few else _over.__wrapped__(self, fallback)


FEW = 64


@functools.lru_cache(512)
def _over(mine: GenerationParams, fallback: GenerationParams) -> GenerationParams:
    values = {n: getattr(mine, n) if getattr(mine, n) is not None else getattr(fallback, n) for n in mine.names()}
    if mine.do_sample and (values["num_beams"] or 1) > 1 and mine.num_beams is None:
        values["num_beams"] = 1
    elif (mine.num_beams or 1) > 1 and values["do_sample"] and mine.do_sample is None:
        values["do_sample"] = False
    return GenerationParams(**values)
