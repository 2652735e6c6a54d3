"""chrF and chrF++ (Popović 2015, 2017), as WebNLG's script of 2020 computes them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from prefixfast.config.json_types import JSON
from prefixfast.metrics.result import MetricUnavailable, MetricValue

WORD_ORDERS = {"chrF++": 2, "chrF": 0}


def chrf(
    outputs: Sequence[str], references: Sequence[Sequence[str]], tables: Sequence[Mapping[str, JSON]] | None
) -> dict[str, MetricValue]:
    """F scores (beta 2) of 1 to 6 characters, for chrF++ of 1 and 2 words too, against the best reference of each text.

    Args:
        outputs: Texts.
        references: References of each text, of which empty ones are left out.
        tables: Not read.

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
