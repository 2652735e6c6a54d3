"""METEOR, ROUGE-L and CIDEr of E2E's script, which are those of COCO's captions, through pycocoevalcap."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import NamedTuple

from prefixfast.metrics.forms import check_texts
from prefixfast.metrics.java import meteor as meteor_process
from prefixfast.metrics.java import package, ptb_lines, running
from prefixfast.metrics.result import MetricValue, References, Scores, Tables, Texts

_PUNCTUATION = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."))


class Captions(NamedTuple):
    """Tokens of texts with spaces between.

    Attributes:
        outputs: Outputs, by number.
        references: References, by the number of their output.
    """

    outputs: dict[int, list[str]]
    references: dict[int, list[str]]


def meteor(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """METEOR 1.5 between 0 and 1.

    Raises:
        MetricUnavailable: If Java or pycocoevalcap is missing.
    """
    captions = _captions(outputs, references)
    with running("METEOR"), meteor_process() as process:
        stats = [
            process.ask(" ||| ".join(("SCORE", *captions.references[i], output.replace("  ", " "))))
            for i, (output,) in captions.outputs.items()
        ]
        answers = [process.ask(" ||| ".join(("EVAL", *stats))), *(process.read() for _ in stats)]
        value = float(answers[-1])
    return {"METEOR": _value(value, "METEOR 1.5 -l en -norm of PTB tokens")}


def rouge_l(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """ROUGE-L between 0 and 1, the mean over texts, with the best precision and the best recall over references.

    Raises:
        MetricUnavailable: If Java or pycocoevalcap is missing.
    """
    captions = _captions(outputs, references)
    value = _score("rouge", "Rouge", captions)
    return {"ROUGE_L": _value(value, "ROUGE-L of COCO's captions, beta 1.2, of PTB tokens")}


def cider(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """CIDEr between 0 and 10. Its weights come from the references of all texts, so that of one text it is 0.

    Raises:
        MetricUnavailable: If Java or pycocoevalcap is missing.
    """
    captions = _captions(outputs, references)
    value = 0.0
    if any(r for own in captions.references.values() for r in own):  # it fails for references without words
        value = _score("cider", "Cider", captions)
    return {"CIDEr": _value(value, "CIDEr of COCO's captions, sigma 6, of PTB tokens")}


def _captions(outputs: Texts, references: References) -> Captions:
    check_texts(outputs, references)
    return _tokenized(tuple(outputs), tuple(map(tuple, references)))


@lru_cache(maxsize=1)  # three metrics in turn take the same texts
def _tokenized(outputs: tuple[str, ...], references: tuple[tuple[str, ...], ...]) -> Captions:
    tokens = iter(map(_words, ptb_lines([r for own in references for r in own])))
    of_references = {i: [next(tokens) for _ in own] for i, own in enumerate(references)}
    return Captions({i: [_words(line)] for i, line in enumerate(ptb_lines(outputs))}, of_references)


def _words(line: str) -> str:
    """Tokens that are no punctuation."""
    return " ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION)


def _score(module: str, scorer: str, captions: Captions) -> float:
    """Score of a class of pycocoevalcap."""
    found = getattr(importlib.import_module(f"pycocoevalcap.{module}.{module}"), scorer)()
    return float(found.compute_score(captions.references, captions.outputs)[0])


def _value(value: float, tool: str) -> MetricValue:
    return MetricValue(value, f"{value:.4f}", f"{tool}; {package()}")
