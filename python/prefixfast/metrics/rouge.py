"""ROUGE-1, ROUGE-2 and ROUGE-L of summaries, as the code of Li & Liang (2021) computes them with rouge-score."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefixfast.io.environment import version
from prefixfast.metrics.forms import check_texts
from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Scores, Tables, Texts

if TYPE_CHECKING:
    import numpy as np

SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
SEED = 0  # of the resampled texts; the authors' code has none, so that its last digits change from run to run
NUM_SAMPLES = 1000  # the default of rouge-score's BootstrapAggregator


def rouge(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """F-measures in percent, with stemmed words and without sentence breaks.

    A text with several references has the best F-measure of each score. The score of all texts is the median of the
    means of 1,000 resamples of the texts, which is near their mean. Words are runs of the letters a to z and of digits,
    so that texts of another alphabet score 0.

    Raises:
        MetricUnavailable: If rouge-score is missing.
    """
    check_texts(outputs, references)
    scorer = new_scorer(tuple(SCORES))
    import numpy as np  # the command line starts without it

    found = [scorer.score_multi(own, output) for output, own in zip(outputs, references, strict=True)]
    generator = np.random.RandomState(SEED)  # rouge-score takes numpy's global one, which threads share
    values = {name: 100 * _median([scores[key] for scores in found], generator) for key, name in SCORES.items()}
    tool = f"rouge-score {version('rouge-score') or 'of unknown version'}: stemmer, median of {NUM_SAMPLES} bootstrap "
    tool += f"samples, seed {SEED}"
    return {name: MetricValue(value, f"{value:.4f}", tool) for name, value in values.items()}


def new_scorer(names: Sequence[str]) -> Any:
    """Scorer of rouge-score with stemmed words.

    Args:
        names: Names of scores in rouge-score, such as those of `SCORES`.

    Raises:
        MetricUnavailable: If rouge-score is missing.
    """
    try:
        scorers, tokenizers = (importlib.import_module(f"rouge_score.{n}") for n in ("rouge_scorer", "tokenizers"))
    except ImportError as e:
        msg = "ROUGE needs rouge-score: pip install 'prefixfast[eval]'"
        raise MetricUnavailable(msg) from e
    # Without a tokenizer rouge-score logs a line in each call.
    return scorers.RougeScorer(list(names), tokenizer=tokenizers.DefaultTokenizer(use_stemmer=True))


def _median(scores: list[Any], generator: np.random.RandomState) -> float:
    """Median F-measure of the means of resampled texts, as rouge-score's BootstrapAggregator draws them.

    Args:
        scores: Precision, recall and F-measure of each text.
        generator: Generator of random numbers.
    """
    import numpy as np

    matrix, numbers = np.vstack(scores), np.arange(len(scores))
    means = [matrix[generator.choice(numbers, size=len(scores))].mean(axis=0)[2] for _ in range(NUM_SAMPLES)]
    return float(np.percentile(means, 50))
