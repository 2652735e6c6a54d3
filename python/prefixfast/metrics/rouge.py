"""ROUGE-1, ROUGE-2 and ROUGE-L of summaries, as the code of Li & Liang (2021) computes them with rouge-score."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from importlib.metadata import version

from prefixfast.metrics.forms import check_texts
from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Scores, Tables, Texts

SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
SEED = 0  # of the resampled texts; the authors' code has none, so that its last digits change from run to run


def rouge(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """F-measures in percent, with stemmed words and without sentence breaks.

    A text with several references has the best F-measure of each score. The score of all texts is the median of the
    means of 1,000 resamples of the texts, which is near their mean. Words are runs of the letters a to z and of digits,
    so that texts of another alphabet score 0.

    Raises:
        MetricUnavailable: If rouge-score is missing.
    """
    check_texts(outputs, references)
    try:
        scorers, scoring = (importlib.import_module(f"rouge_score.{name}") for name in ("rouge_scorer", "scoring"))
    except ImportError as e:
        msg = "ROUGE needs rouge-score: pip install 'prefixfast[eval]'"
        raise MetricUnavailable(msg) from e
    scorer = scorers.RougeScorer(list(SCORES), use_stemmer=True)
    aggregator = scoring.BootstrapAggregator()
    for output, own in zip(outputs, references, strict=True):
        aggregator.add_scores(scorer.score_multi(own, output))
    with _numpy_seed(SEED):
        found = aggregator.aggregate()
    values = {name: 100 * float(found[key].mid.fmeasure) for key, name in SCORES.items()}
    tool = f"rouge-score {version('rouge-score')}: stemmer, median of 1000 bootstrap samples, seed {SEED}"
    return {name: MetricValue(value, f"{value:.4f}", tool) for name, value in values.items()}


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Context manager of numpy's global generator, which the aggregator uses; its state comes back."""
    import numpy as np  # the command line starts without it

    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
