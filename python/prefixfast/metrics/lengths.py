"""Lengths of texts, share of distinct n-grams, and share of empty texts."""

from __future__ import annotations

from collections.abc import Sequence

from prefixfast.metrics.result import MetricValue, References, Score, Scores, Tables, Texts

LENGTH = "mean number of words between white space"
DISTINCT = "different n-grams of words in lower case, over their number in all texts (Li et al. 2016)"
TOOLS = {
    "length": LENGTH,
    "reference length": LENGTH,
    "distinct-1": DISTINCT,
    "distinct-2": DISTINCT,
    "empty": "share of texts without a word",
}
SCORES = (
    Score("length", "words", None),
    Score("reference length", "words", None),
    Score("distinct-1", "0 to 1", None),  # few words are distinct in long texts, and all of them in noise
    Score("distinct-2", "0 to 1", None),
    Score("empty", "0 to 1", "lower"),
)


def lengths(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """Mean number of words, share of distinct words and pairs of words, and share of texts without a word."""
    words = [text.lower().split() for text in outputs]
    ours = sum(map(len, words)) / len(words)
    theirs = [len(text.split()) for group in references for text in group]
    values = {
        "length": ours,
        "reference length": sum(theirs) / len(theirs),
        "distinct-1": _distinct(words, 1),
        "distinct-2": _distinct(words, 2),
        "empty": sum(not own for own in words) / len(words),
    }
    digits = dict(zip(TOOLS, (2, 2, 4, 4, 4), strict=True))
    return {name: MetricValue(value, f"{value:.{digits[name]}f}", TOOLS[name]) for name, value in values.items()}


def _distinct(texts: Sequence[Sequence[str]], order: int) -> float:
    """Number of different n-grams divided by the number of n-grams; 0 without any."""
    grams = [tuple(words[i : i + order]) for words in texts for i in range(len(words) - order + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
