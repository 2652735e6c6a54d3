"""`GenerationParams`, the options that say how tokens are chosen."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, Unpack

from prefixfast.config.fields import GenerationParamsFields
from prefixfast.config.json_types import JSON
from prefixfast.config.options import (
    COUNT,
    COUNT_OR_ZERO,
    FP32_MAX,
    INT32_MAX,
    SEED,
    Options,
    Range,
    option,
    plain_number,
)
from prefixfast.errors import is_text

TOKEN_OR_NONE = Range(-1, INT32_MAX)
CACHED_LENGTH = 64  # largest number of bad words and stop strings of parameters whose merge is cached


@dataclass(frozen=True, kw_only=True)
class GenerationParams(Options):
    """Options that say how tokens are chosen.

    A field that is None inherits its value. The order of precedence is call, request, prefix, the base model's
    ``generation_config``, and the built-in default: greedy decoding of at most 256 new tokens.

    Example:
        >>> GenerationParams(num_beams=3).over(GenerationParams(max_new_tokens=9, num_beams=2)).num_beams
        3
        >>> GenerationParams.make(max_tokens=9)
        Traceback (most recent call last):
        prefixfast.errors.ConfigError: GenerationParams: unknown option 'max_tokens'; did you mean max_new_tokens?
    """

    argument: ClassVar[str] = "params"

    max_new_tokens: int | None = option(
        None, "largest number of tokens to generate; None inherits, built-in 256", COUNT
    )
    min_new_tokens: int | None = option(
        None, "number of tokens before which no end token is generated; None inherits, built-in 0", COUNT_OR_ZERO
    )
    num_beams: int | None = option(
        None, "number of beams of a beam search; 1 is greedy decoding or sampling; None inherits, built-in 1", COUNT
    )
    do_sample: bool | None = option(
        None, "whether to sample tokens instead of taking the most likely one; None inherits, built-in false"
    )
    temperature: float | None = option(
        None,
        "divisor of the logits before a token is sampled, at least 1e-6; None inherits, built-in 1",
        Range(1e-6, FP32_MAX, advice=" (use do_sample=False for the most likely token)"),
    )
    top_k: int | None = option(
        None,
        "number of most likely tokens to sample from; 0 samples from all; None inherits, built-in 50",
        COUNT_OR_ZERO,
    )
    top_p: float | None = option(
        None,
        "total probability of the most likely tokens to sample from, more than 0 and at most 1; None inherits, "
        "built-in 1",
        Range(0, 1, above=True),
    )
    min_p: float | None = option(
        None,
        "smallest probability of a token to sample, as a share of the most likely token's, 0 to 1; None inherits, "
        "built-in 0",
        Range(0, 1),
    )
    repetition_penalty: float | None = option(
        None,
        "divisor of positive and factor of negative logits of tokens that prompt or text contain; None inherits, "
        "built-in 1",
        Range(1e-6, 1e6),
    )
    no_repeat_ngram_size: int | None = option(
        None,
        "length in tokens of sequences that do not occur twice in prompt and text; 0 turns it off; None inherits, "
        "built-in 0",
        COUNT_OR_ZERO,
    )
    encoder_no_repeat_ngram_size: int | None = option(
        None,
        "length in tokens of sequences of the source, or of a decoder-only base's prompt, that do not occur in "
        "the text; 0 turns it off; None inherits, built-in 0",
        COUNT_OR_ZERO,
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = option(
        None, "sequences of token ids that are never generated; None inherits, built-in none"
    )
    forced_bos_token_id: int | None = option(
        None,
        "token that is always generated first, for encoder-decoder bases; -1 forces none; None inherits, built-in -1",
        TOKEN_OR_NONE,
    )
    forced_eos_token_id: int | None = option(
        None,
        "token that is always generated as the last of max_new_tokens, for encoder-decoder bases; -1 forces none; None "
        "inherits, built-in -1",
        TOKEN_OR_NONE,
    )
    decoder_start_token_id: int | None = option(
        None,
        "token that the decoder starts from, for encoder-decoder bases, some of which start from the language of the "
        "text; None inherits that of the base",
        COUNT_OR_ZERO,
    )
    max_source_length: int | None = option(
        None,
        "largest number of tokens of the source, the text that the encoder reads; a longer one loses its end but "
        "keeps its last special tokens; None inherits, built-in no truncation",
        COUNT,
    )
    stop_strings: tuple[str, ...] | None = option(
        None, "strings that end the text where the first of them is complete, and stay in it; None inherits"
    )
    length_penalty: float | None = option(
        None,
        "exponent of the length by which a beam's score is divided; None inherits, built-in 1",
        Range(-FP32_MAX, FP32_MAX),
    )
    early_stopping: Literal[True, False, "never"] | None = option(
        None,
        "condition that ends a beam search, as in transformers: true as soon as num_beams texts are complete, false "
        "when better ones are unlikely, never when better ones are impossible; None inherits, built-in false",
    )
    num_return_sequences: int | None = option(
        None, "number of texts of a request: the best beams, or independent samples; None inherits, built-in 1", COUNT
    )
    seed: int | None = option(
        None,
        "random seed of sampling; on a CPU with prepacked weights and without share_prompts, a request with a seed "
        "gives the same text alone and in any batch (docs/generation.md lists the limits); None draws one",
        SEED,
    )
    logprobs: int | None = option(
        None,
        "number of most likely tokens per step to report with their log-probabilities, beside the chosen one, before "
        "any logits processor; None reports none",
        COUNT_OR_ZERO,
    )

    @classmethod
    def make(cls, config: Self | Mapping[str, JSON] | None = None, **fields: Unpack[GenerationParamsFields]) -> Self:
        """Make a `GenerationParams` from another one or from a mapping, with some fields replaced.

        Args:
            config: `GenerationParams` or mapping of field names to values. None takes the defaults.
            fields: Fields of `GenerationParams`, which take precedence over ``config``.

        Returns:
            A new `GenerationParams`.

        Raises:
            ConfigError: If a name is unknown or a value is wrong.
        """
        return cls._replaced(config, fields)

    def __post_init__(self) -> None:
        # JSON and users give lists; tuples make the object hashable.
        for name, inner in (("bad_words_ids", True), ("stop_strings", False)):
            value: Any = getattr(self, name)
            if isinstance(value, str) and not inner:
                value = (value,)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(_as_ids(v) if inner else v for v in value))
        super().__post_init__()

    def validate(self) -> None:
        """Raise `ConfigError` for values out of range."""
        words, strings = self.bad_words_ids or (), self.stop_strings or ()
        if not all(isinstance(w, tuple) and w and all(map(_is_id, w)) for w in words):
            self._check("bad_words_ids", "lists of token ids")
        if not all(isinstance(s, str) and s for s in strings):
            self._check("stop_strings", "non-empty strings")
        if not all(map(is_text, strings)):
            self._check("stop_strings", "Unicode text without half a surrogate pair")

    def over(self, fallback: GenerationParams) -> GenerationParams:
        """`GenerationParams` with the values of this object, and those of ``fallback`` where this object has None.

        Beams and sampling exclude each other. If this object asks for one of them, the other one is taken from
        ``fallback`` as switched off.

        Args:
            fallback: Parameters of lower precedence.
        """
        short = all(len(p.bad_words_ids or ()) + len(p.stop_strings or ()) < CACHED_LENGTH for p in (self, fallback))
        return _merged(self, fallback) if short else _merged.__wrapped__(self, fallback)


def _as_ids(word: Any) -> Any:
    """A list or tuple of numbers as a tuple of Python's integers; other values unchanged."""
    return tuple(map(plain_number, word)) if isinstance(word, list | tuple) else word


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= INT32_MAX


@functools.lru_cache(512)
def _merged(mine: GenerationParams, fallback: GenerationParams) -> GenerationParams:
    values = {n: getattr(mine, n) if getattr(mine, n) is not None else getattr(fallback, n) for n in mine.names()}
    if mine.do_sample and (values["num_beams"] or 1) > 1 and mine.num_beams is None:
        values["num_beams"] = 1
    elif (mine.num_beams or 1) > 1 and values["do_sample"] and mine.do_sample is None:
        values["do_sample"] = False
    return GenerationParams(**values)
