"""BLEU as the official scripts compute it, from n-gram counts of sacrebleu.

sacrebleu's own score equals theirs only for texts of usual length. It gives 0 where mteval-v13a smooths, that is for
texts without a common word or with fewer than four words, it lower-cases letters outside ASCII, and it takes no absent
reference for one of length 0, as multi-bleu.perl does.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefixfast.metrics.forms import NUM_REFERENCES, Forms, check_texts, dart_forms, webnlg_forms
from prefixfast.metrics.mteval import mteval_tokens
from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Scores, Tables, Texts


class _Counts(NamedTuple):
    """Counts of all texts: matching and all n-grams of 1 to 4 tokens, and tokens of outputs and references."""

    matching: list[int]
    total: list[int]
    output_len: int
    reference_len: int

    def brevity_penalty(self) -> float:
        return math.exp(min(0.0, 1 - self.reference_len / self.output_len)) if self.output_len else 0.0


def bleu(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """BLEU of mteval-v13a between 0 and 1, as E2E's script prints it.

    Raises:
        MetricUnavailable: If sacrebleu is missing.
    """
    check_texts(outputs, references)
    tokens = [[mteval_tokens(r) for r in own] for own in references]
    # The script skips an empty reference, but for the first.
    columns = [[" ".join(r) for i, r in enumerate(own) if r or i == 0] for own in tokens]
    counts = _counts([" ".join(mteval_tokens(o)) for o in outputs], columns)
    logs, smoothing = 0.0, 1
    for matching, total in zip(counts.matching, counts.total, strict=True):
        if matching:
            logs += math.log(matching / total)
        elif total:
            smoothing *= 2
            logs -= math.log(smoothing * total)
    value = counts.brevity_penalty() * math.exp(logs / 4)
    return {"BLEU": MetricValue(value, f"{value:.4f}", f"mteval-v13a: lower case, smoothed; {_version()}")}


def multi_bleu_lc(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """BLEU of ``multi-bleu.perl -lc`` in percent, as WebNLG's script of 2017 computes it.

    The first three references of a text count.

    Raises:
        MetricUnavailable: If sacrebleu is missing, or a character needs Unidecode, which is missing.
    """
    forms = webnlg_forms(outputs, references)
    wide = max(map(len, forms.references))
    lower = Forms([o.lower() for o in forms.outputs], [[r.lower() for r in own] for own in forms.references])
    return {"BLEU": _multi_bleu(lower, wide, "multi-bleu.perl -lc: ASCII, lower case, 3 references")}


def multi_bleu(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """BLEU of ``multi-bleu.perl`` in percent, as DART's script computes it.

    The first three references of a text count.

    Raises:
        MetricUnavailable: If sacrebleu is missing.
    """
    forms = dart_forms(outputs, references)
    return {"BLEU": _multi_bleu(forms, NUM_REFERENCES, "multi-bleu.perl: form of DART's files, 3 references")}


def bleu_totto(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """BLEU of sacrebleu's command line in percent, as ToTTo's script calls it, without its detokenizer.

    The script fills up to three references with the text ``<null>``.

    Raises:
        MetricUnavailable: If sacrebleu is missing.
    """
    check_texts(outputs, references)
    wide = max(NUM_REFERENCES, *map(len, references))
    filled = [[r.lower() for r in own] + ["<null>"] * (NUM_REFERENCES - len(own)) for own in references]
    metric = _sacrebleu().BLEU()
    columns = [[own[i] if i < len(own) else None for own in filled] for i in range(wide)]
    value = float(metric.corpus_score([o.lower() for o in outputs], columns).score)
    return {"BLEU": MetricValue(value, f"{value:.1f}", f"sacrebleu {metric.get_signature()}, lower case")}


def _multi_bleu(forms: Forms, num_files: int, tool: str) -> MetricValue:
    """BLEU of multi-bleu.perl for a number of files of references, in which an absent reference is an empty line."""
    filled = [own + [""] * (num_files - len(own)) for own in forms.references]
    counts = _counts(forms.outputs, filled)
    value = 0.0
    if all(counts.matching) and counts.reference_len:
        logs = sum(math.log(m / t) for m, t in zip(counts.matching, counts.total, strict=True))
        value = 100 * counts.brevity_penalty() * math.exp(logs / 4)
    return MetricValue(value, f"{value:.2f}", f"{tool}; {_version()}")


def _counts(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> _Counts:
    """Counts of texts whose tokens stand between spaces."""
    metric = _sacrebleu().BLEU(tokenize="none", smooth_method="none", force=True)
    wide = max(map(len, references))
    columns = [[own[i] if i < len(own) else None for own in references] for i in range(wide)]
    score = metric.corpus_score(list(outputs), columns)
    return _Counts(score.counts, score.totals, score.sys_len, score.ref_len)


def _version() -> str:
    return f"counts of sacrebleu {importlib.import_module('sacrebleu').__version__}"


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as e:
        msg = "BLEU needs sacrebleu: pip install 'prefixfast[eval]'"
        raise MetricUnavailable(msg) from e
