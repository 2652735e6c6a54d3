"""NIST score of mteval-v13a, as E2E's script prints it. No library computes it for texts with several references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from prefixfast.metrics.forms import check_texts
from prefixfast.metrics.mteval import mteval_tokens
from prefixfast.metrics.result import MetricValue, References, Scores, Tables, Texts

Ngram: TypeAlias = tuple[str, ...]
MAX_ORDER = 5
_PENALTY = -math.log(0.5) / math.log(1.5) ** 2  # an output of two thirds of the length has half the score


def nist(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """NIST score with 5-grams in lower case."""
    check_texts(outputs, references)
    words = [mteval_tokens(o) for o in outputs]
    reference_words = [[mteval_tokens(r) for r in own] for own in references]
    value = _nist(words, reference_words)
    return {"NIST": MetricValue(value, f"{value:.4f}", "mteval-v13a: lower case, 5-grams")}


def _nist(words: Sequence[Sequence[str]], reference_words: Sequence[Sequence[Sequence[str]]]) -> float:
    """Score of tokens; 0 if the outputs or the references have none."""
    ngrams = [[_ngrams(r) for r in own] for own in reference_words]
    counts: Counter[Ngram] = Counter()
    for own in ngrams:
        for found in own:
            counts.update(found)
    num_words = sum(len(r) for own in reference_words for r in own)
    num_references = sum(bool(r) for own in reference_words for r in own)
    num_outputs = sum(map(len, words))
    if not num_words or not num_outputs:
        return 0.0
    information = [0.0] * MAX_ORDER
    for tokens, own in zip(words, ngrams, strict=True):
        for ngram, count in _ngrams(tokens).items():
            if matching := min(count, max(found[ngram] for found in own)):
                # The script takes an n-gram after the word 0 for one without words before it.
                before = num_words if ngram[:-1] in ((), ("0",)) else counts[ngram[:-1]]
                information[len(ngram) - 1] += matching * math.log2(before / counts[ngram])
    totals = [sum(max(0, len(tokens) - n) for tokens in words) for n in range(MAX_ORDER)]
    mean_length = num_words / (num_references / len(words))
    ratio = min(1.0, num_outputs / mean_length)
    return sum(i / max(t, 1) for i, t in zip(information, totals, strict=True)) * math.exp(
        -_PENALTY * math.log(ratio) ** 2
    )


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_ORDER + 1) for i in range(len(tokens) - n + 1))
