"""chrF and chrF++ (Popović 2015, 2017), as WebNLG's script of 2020 computes them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Scores, Tables, Texts

WORD_ORDERS = {"chrF++": 2, "chrF": 0}


def chrf(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """F scores (beta 2) of 1 to 6 characters, for chrF++ of 1 and 2 words too, against the best reference of each text.

    Empty references are left out.

    Raises:
        MetricUnavailable: If sacrebleu is not installed.
    """
    try:
        library = importlib.import_module("sacrebleu")
    except ImportError as e:
        msg = "chrF needs sacrebleu: pip install 'prefixfast[eval]'"
        raise MetricUnavailable(msg) from e
    groups = [[text for text in own if text.strip()] or [""] for own in references]
    most = max(map(len, groups))
    columns = [[own[i] if i < len(own) else None for own in groups] for i in range(most)]
    return {name: _value(library, outputs, columns, order) for name, order in WORD_ORDERS.items()}


def _value(library: object, outputs: Sequence[str], columns: list[list[str | None]], word_order: int) -> MetricValue:
    metric = library.CHRF(word_order=word_order, eps_smoothing=True)  # type: ignore[attr-defined]
    score = float(metric.corpus_score([*outputs], columns).score) / 100
    return MetricValue(score, f"{round(score, 2):g}", f"sacrebleu {metric.get_signature()}")
