"""ROUGE against the code of Li & Liang, and its properties."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metric_texts import FEW, PAIRS
from official import texts
from prefixfast.errors import ConfigError
from prefixfast.metrics import rouge as module
from prefixfast.metrics.result import MetricUnavailable
from prefixfast.metrics.rouge import SCORES, rouge

# Printed by `calculate_rouge` of XiangLi1999/PrefixTuning, seq2seq/utils.py at 6519d30e, for the first references,
# with rouge-score 0.1.2 after `numpy.random.seed(0)`.
PRINTED = {
    "plain": {"ROUGE-1": "71.3248", "ROUGE-2": "45.9509", "ROUGE-L": "54.1871"},
    "edge": {"ROUGE-1": "61.9048", "ROUGE-2": "39.5604", "ROUGE-L": "61.9048"},
}


@pytest.fixture
def few_samples(monkeypatch) -> None:
    monkeypatch.setattr(module, "NUM_SAMPLES", 20)


def values(outputs, references) -> list[float]:
    return [v.value for v in rouge(outputs, references).values()]


@pytest.mark.parametrize("name", PRINTED)
def test_the_authors_code(name, caplog):
    outputs, references = texts(name)
    with caplog.at_level("INFO"):
        found = rouge(outputs, [own[:1] for own in references])
    assert {k: v.text for k, v in found.items()} == PRINTED[name]
    assert caplog.records == []  # rouge-score logs a line unless it is given a tokenizer


@pytest.mark.parametrize("name", PRINTED)
def test_the_resamples_of_the_library(name):
    from rouge_score import rouge_scorer, scoring

    outputs, references = texts(name)
    scorer, aggregator = rouge_scorer.RougeScorer(list(SCORES), use_stemmer=True), scoring.BootstrapAggregator()
    for output, own in zip(outputs, references, strict=True):
        aggregator.add_scores(scorer.score_multi(own, output))
    state = np.random.get_state()
    np.random.seed(0)
    expected = {SCORES[k]: 100 * v.mid.fmeasure for k, v in aggregator.aggregate().items()}
    np.random.set_state(state)
    assert {k: v.value for k, v in rouge(outputs, references).items()} == expected


def test_threads_have_the_same_scores():
    outputs, references = texts("plain")
    alone = rouge(outputs, references)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: rouge(outputs, references), range(12))) == [alone] * 12


def test_a_library_without_metadata(monkeypatch):
    """Such as that of a checkout on the path of modules."""
    monkeypatch.setattr(module, "version", lambda package: None)
    assert "of unknown version" in rouge(["a"], [["a"]])["ROUGE-1"].tool


def test_the_same_scores_each_time_and_numpy_s_generator_as_it_was():
    outputs, references = texts("plain")
    np.random.seed(5)
    first = np.random.rand()
    np.random.seed(5)
    scores = rouge(outputs, references)
    assert np.random.rand() == first
    assert rouge(outputs, references) == scores


@FEW
@given(PAIRS, st.randoms())
@pytest.mark.usefixtures("few_samples")
def test_properties(pairs, random):
    outputs, references = map(list, zip(*pairs, strict=True))
    found = values(outputs, references)
    assert values(outputs, [random.sample(r, len(r)) for r in references]) == found
    assert values(outputs, [[*r, r[0]] for r in references]) == found
    assert all(more >= one for more, one in zip(found, values(outputs, [r[:1] for r in references]), strict=True))
    assert all(0 <= x <= 100 for x in found)


def test_one_text_has_its_own_score():
    """Resamples of texts with one score have its mean, in any order."""
    assert values(["the cats sat"] * 3, [["the cat sits", "the cat sat"]] * 3) == pytest.approx([100, 100, 100])
    assert values(["a b"], [["a c"]]) == pytest.approx([50, 0, 50])


def test_texts_without_words():
    assert values(["", " \n", "日本"], [["a b"], ["", "c"], ["日本"]]) == [0, 0, 0]


def test_the_order_of_texts_changes_the_resamples_alone():
    outputs, references = texts("plain")
    other = values(outputs[::-1], references[::-1])
    assert values(outputs, references) == pytest.approx(other, abs=1)


def test_another_number_of_references_is_refused():
    with pytest.raises(ConfigError, match="1 texts and 2 lists of references"):
        rouge(["a"], [["a"], ["b"]])


def test_without_rouge_score(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
    with pytest.raises(MetricUnavailable, match=r"pip install 'prefixfast\[eval\]'"):
        rouge(["a"], [["a"]])
    assert module.SEED == 0
