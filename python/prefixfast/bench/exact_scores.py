"""Comparison of the contenders' tokens, by which a suite decides whether it reports a speed.

Two texts of the same prompt and prefix count as equal if they are the same tokens. Where they differ, both are scored
by the base in fp64: each token must be the best one after its own text, up to `GAP`. In bf16 and fp16 rounding alone
exceeds `GAP`. There the limit is `ROUNDINGS` times the rounding error of transformers' own logits in that dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixfast.bench.decoding import Decoding
from prefixfast.bench.harness import WrongResultError
from prefixfast.prefix.prefix import Prefix

GAP = 1e-4  # largest distance in fp64 of a chosen token's score from the best one's, in nats
# Two logits, each with at most twice the error of transformers', can change places if they are this far apart.
ROUNDINGS = 4.0


class Text(NamedTuple):
    """Tokens that one contender generated.

    Attributes:
        contender: Name of the contender.
        prompt: Number of the prompt.
        prefix: Number of the prefix, None for none.
        tokens: Generated token ids.
    """

    contender: str
    prompt: int
    prefix: int | None
    tokens: tuple[int, ...]


class Gap(NamedTuple):
    """Largest gap of a text, the limit for it, and the number of the token that has it."""

    size: float
    limit: float
    token: int


@dataclass
class ExactScores:
    """Scores of generated tokens by a base of transformers in fp64.

    Attributes:
        plain: Base of transformers in the compute dtype, not attached.
        prompts: Token ids of each prompt.
        prefix: Function from the number of a prefix to the prefix.
        decoding: Settings of the generation.
    """

    plain: PreTrainedModel
    prompts: Sequence[Sequence[int]]
    prefix: Callable[[int], Prefix]
    decoding: Decoding

    @cached_property
    def exact(self) -> PreTrainedModel:
        """Copy of the base in fp64."""
        return copy.deepcopy(self.plain).double()

    @property
    def is_rounded(self) -> bool:
        """Whether rounding in the compute dtype exceeds `GAP`."""
        return self.plain.dtype in (torch.bfloat16, torch.float16)

    @torch.inference_mode()
    def gap(self, text: Text) -> Gap:
        """Largest distance of a token's score from the best allowed token's, each after the text's own tokens."""
        tokens = torch.tensor(text.tokens, device=self.plain.device)
        exact = self._logits(self.exact, text)
        limit = GAP
        if self.is_rounded:
            limit = max(limit, ROUNDINGS * float((self._logits(self.plain, text) - exact).abs().max()))
        exact[: self.decoding.min_new_tokens, list(self.decoding.end_ids)] = -torch.inf
        gaps = exact.amax(-1) - exact.gather(-1, tokens[:, None])[:, 0]
        return Gap(float(gaps.max()), limit, int(gaps.argmax()))

    def _logits(self, hf: PreTrainedModel, text: Text) -> Tensor:
        """Logits from which each token was chosen, fp64 ``[new, V]``, from one forward pass."""
        ids = torch.tensor([[*self.prompts[text.prompt], *text.tokens[:-1]]], device=hf.device)
        cache, length = DynamicCache(), 0
        if text.prefix is not None:
            prefix = self.prefix(text.prefix)
            length = prefix.length_at("self")
            for i in prefix.layers:
                k, v = (prefix.kv[f"self.{i}.{x}"].transpose(0, 1)[None].to(self.plain.dtype) for x in "kv")
                cache.update(k.to(hf.dtype), v.to(hf.dtype), i)
        positions = torch.arange(length, length + ids.shape[1], device=hf.device)[None]
        out = hf(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True)
        logits: Tensor = out.logits[0, -len(text.tokens) :].double()
        return logits


def check_same_tokens(texts: Iterable[Text], scores: ExactScores, what: str) -> float:
    """Check that texts of the same prompt and prefix are equal.

    Args:
        texts: Texts of all contenders. In bf16 and fp16 each text is compared with fp64, else only those that differ.
        scores: Scores in fp64.
        what: Beginning of the error's message.

    Returns:
        Largest gap of a text that was scored, 0 if none was.

    Raises:
        WrongResultError: If a token is worse than the best one by more than its limit.
    """
    by_source: dict[tuple[int, int | None], dict[tuple[int, ...], Text]] = {}
    for text in texts:
        by_source.setdefault((text.prompt, text.prefix), {}).setdefault(text.tokens, text)
    largest = 0.0
    for different in by_source.values():
        if len(different) > 1 or scores.is_rounded:
            largest = max(largest, _check(different, scores, what))
    return largest


def _check(different: Mapping[tuple[int, ...], Text], scores: ExactScores, what: str) -> float:
    """Largest gap of the different texts of one prompt and prefix."""
    gaps = []
    for text in different.values():
        gap = scores.gap(text)
        if not gap.size <= gap.limit:
            others = ", ".join(t.contender for t in different.values() if t is not text)
            msg = (
                f"{what}: {text.contender}: token {gap.token} of request {text.prompt} is {gap.size:.1e} worse than "
                f"the best one in fp64, expected at most {gap.limit:.1e}"
                + (f" (other tokens: {others})" if others else "")
                + "; no speed is reported on wrong results"
            )
            raise WrongResultError(msg)
        gaps.append(gap.size)
    return max(gaps)
