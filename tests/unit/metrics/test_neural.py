"""Calls of BERTScore, MoverScore and BLEURT: the parameters of DART's script, and named gaps."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pytest

from prefixfast import evaluate
from prefixfast.metrics import neural
from prefixfast.metrics.neural import bertscore, bleurt, moverscore
from prefixfast.metrics.result import MetricUnavailable

OUTPUTS, REFERENCES = ["The Mill.", "B-c"], [["A Mill.", "The mill!", "x", "fourth"], ["b"]]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Modules in the place of the libraries, with their calls, and a cache that has all weights."""
    calls = []

    def record(name, result):
        def call(*args, **named):
            calls.append((name, args, named))
            return result

        return call

    class Scorer:
        def __init__(self, checkpoint):
            calls.append(("checkpoint", (checkpoint,), {}))

        score = staticmethod(record("bleurt", [-0.5, 0.75]))

    modules = {
        "bert_score": {"score": record("bertscore", ([0], [0], [0.5, 1.0])), "__version__": "0.3.13"},
        "moverscore_v2": {
            "get_idf_dict": lambda texts: {"idf of": texts},
            "word_mover_score": record("moverscore", [0.5, 0.25]),
        },
        "bleurt": {},
        "bleurt.score": {"BleurtScorer": Scorer},
    }
    for name, names in modules.items():
        module = ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "test_checkpoint").mkdir()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(neural.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model, name: f"/cache/{model}/{name}")
    return calls


def test_bertscore(installed):
    """Model and layer are bert-score's for English; references after the third are left out."""
    value = bertscore(OUTPUTS, REFERENCES, None)["BERTScore"]
    assert (value.value, value.text) == (0.75, "0.75")
    ((_, texts, named),) = installed
    assert texts == (["the mill .", "b - c"], [["a mill .", "the mill !", "x"], ["b"]])
    assert named == {"model_type": "/cache/roberta-large", "num_layers": 17, "idf": False, "lang": "en"}


def test_moverscore(installed):
    value = moverscore(OUTPUTS, REFERENCES, None)["MoverScore"]
    assert value.value == 0.375
    ((_, texts, named),) = installed
    firsts, outputs = ["a mill .", "b"], ["the mill .", "b - c"]
    assert texts == (firsts, outputs, {"idf of": firsts}, {"idf of": outputs})
    assert named == {"stop_words": [], "n_gram": 1, "remove_subwords": True}


def test_bleurt(installed, tmp_path, monkeypatch):
    assert bleurt(OUTPUTS, REFERENCES, None)["BLEURT"].value == 0.125
    (_, folder, _), (_, _, named) = installed
    assert folder == (str(tmp_path / "test_checkpoint"),)
    assert named == {"references": ["a mill .", "b"], "candidates": ["the mill .", "b - c"]}
    monkeypatch.setenv("BLEURT_CHECKPOINT", str(tmp_path / "none"))
    with pytest.raises(MetricUnavailable, match="BLEURT_CHECKPOINT"):
        bleurt(OUTPUTS, REFERENCES, None)


@pytest.mark.parametrize(("function", "model"), [(bertscore, "roberta-large"), (moverscore, "distilbert-base-uncased")])
@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_weights_are_not_downloaded(installed, monkeypatch, function, model, absent):
    have = {"config.json", "model.safetensors"} - {absent}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, name: "/c/x" if name in have else None)
    with pytest.raises(MetricUnavailable, match=f"weights of {model}"):
        function(OUTPUTS, REFERENCES, None)
    assert installed == []


def test_packages_that_fail_are_named_gaps(installed, monkeypatch):
    def fail(*_, **__):
        msg = "weights of another shape"
        raise RuntimeError(msg)

    monkeypatch.setattr(sys.modules["bert_score"], "score", fail)
    with pytest.raises(MetricUnavailable, match="BERTScore failed: RuntimeError: weights of another shape"):
        bertscore(OUTPUTS, REFERENCES)


def test_missing_packages_are_named_gaps(monkeypatch):
    for name in ("bert_score", "moverscore_v2", "bleurt", "bleurt.score"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(neural.importlib.util, "find_spec", lambda name: None)
    names = ["moverscore", "bertscore", "bleurt"]
    monkeypatch.setitem(sys.modules["prefixfast.metrics.evaluate"].TASK_METRICS, "dart", ("ter", *names))
    found = evaluate(OUTPUTS, REFERENCES, task="dart")
    assert list(found) == ["TER"]
    assert list(found.missing) == ["MoverScore", "BERTScore", "BLEURT"]
    for name in names:
        with pytest.raises(MetricUnavailable, match="not installed"):
            evaluate(OUTPUTS, REFERENCES, task="dart", metrics=[name])
