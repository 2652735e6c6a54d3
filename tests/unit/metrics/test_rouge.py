"""ROUGE against the code of Li & Liang, and its properties."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metric_texts import FEW, PAIRS
from official import texts
from prefixfast.errors import ConfigError
from prefixfast.metrics import rouge as module
from prefixfast.metrics.result import MetricUnavailable
from prefixfast.metrics.rouge import rouge

# Printed by `calculate_rouge` of XiangLi1999/PrefixTuning, seq2seq/utils.py at 6519d30e, for the first references,
# with rouge-score 0.1.2 after `numpy.random.seed(0)`.
PRINTED = {
    "plain": {"ROUGE-1": "71.3248", "ROUGE-2": "45.9509", "ROUGE-L": "54.1871"},
    "edge": {"ROUGE-1": "61.9048", "ROUGE-2": "39.5604", "ROUGE-L": "61.9048"},
}


@pytest.fixture
def few_samples(monkeypatch) -> None:
    from rouge_score import scoring

    monkeypatch.setattr(scoring.BootstrapAggregator.__init__, "__defaults__", (0.95, 20))


def values(outputs, references) -> list[float]:
    return [v.value for v in rouge(outputs, references).values()]


@pytest.mark.parametrize("name", PRINTED)
def test_the_authors_code(name, capfd):
    outputs, references = texts(name)
    found = rouge(outputs, [own[:1] for own in references])
    assert {k: v.text for k, v in found.items()} == PRINTED[name]
    assert capfd.readouterr().err == ""


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
