"""BERTScore, MoverScore and BLEURT as DART's script calls them, with weights that are on this machine already."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefixfast.errors import PrefixFastError
from prefixfast.metrics.forms import dart_forms
from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Scores, Tables, Texts

BERTSCORE_MODEL, BERTSCORE_LAYER = "roberta-large", 17  # bert-score's defaults for English
MOVERSCORE_MODEL = "distilbert-base-uncased"  # the default of moverscore_v2
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CHECKPOINT = "BLEURT_CHECKPOINT"  # environment variable


@contextlib.contextmanager
def _optional(metric: str) -> Iterator[None]:
    """Context manager of a metric whose package or weights can fail in any way.

    Raises:
        MetricUnavailable: If they fail, with their error.
    """
    try:
        yield
    except PrefixFastError:
        raise
    except Exception as e:
        msg = f"{metric} failed: {type(e).__name__}: {e}"
        raise MetricUnavailable(msg) from e


@_optional("BERTScore")
def bertscore(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """Mean F1 of BERTScore against the best of the first three references (``bert-score --lang en``).

    Raises:
        MetricUnavailable: If bert-score or the weights of roberta-large are not on this machine.
    """
    library = _library("bert_score", "BERTScore", "pip install bert-score")
    folder = _weights(BERTSCORE_MODEL, "BERTScore")
    forms = dart_forms(outputs, references)
    groups = [[text for text in own if text] or [""] for own in forms.references]
    _, _, scores = library.score(
        forms.outputs, groups, model_type=str(folder), num_layers=BERTSCORE_LAYER, idf=False, lang="en"
    )
    version = getattr(library, "__version__", "of unknown version")
    tool = f"bert-score {version}, {BERTSCORE_MODEL} layer {BERTSCORE_LAYER}, no idf, texts in DART's form"
    return {"BERTScore": _value([float(x) for x in scores], tool)}


@_optional("MoverScore")
def moverscore(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """Mean MoverScore (version 2, single words, idf of the texts) against the first reference of each text.

    Raises:
        MetricUnavailable: If moverscore or the weights of distilbert-base-uncased are not on this machine.
    """
    if importlib.util.find_spec("moverscore_v2") is not None:
        _weights(os.environ.get("MOVERSCORE_MODEL", MOVERSCORE_MODEL), "MoverScore")  # the import would fetch them
    library = _library("moverscore_v2", "MoverScore", "pip install moverscore")
    forms = dart_forms(outputs, references)
    firsts = [own[0] for own in forms.references]
    idf_reference, idf_output = library.get_idf_dict(firsts), library.get_idf_dict(forms.outputs)
    scores = library.word_mover_score(
        firsts, forms.outputs, idf_reference, idf_output, stop_words=[], n_gram=1, remove_subwords=True
    )
    tool = "moverscore_v2, single words, idf, no stop words, first reference, texts in DART's form"
    return {"MoverScore": _value(scores, tool)}


@_optional("BLEURT")
def bleurt(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """Mean BLEURT against the first reference of each text.

    The environment variable ``BLEURT_CHECKPOINT`` names the folder of a checkpoint. Without it the test checkpoint
    inside the package is used, as by DART's script.

    Raises:
        MetricUnavailable: If bleurt or its checkpoint is not on this machine.
    """
    if (package := importlib.util.find_spec("bleurt")) is None:
        msg = "BLEURT needs google-research/bleurt, which is not installed: clone it, then pip install ./bleurt"
        raise MetricUnavailable(msg)
    inside = Path((package.submodule_search_locations or [""])[0]) / "test_checkpoint"
    checkpoint = Path(os.environ.get(CHECKPOINT, inside))
    if not checkpoint.is_dir():
        msg = f"BLEURT needs a checkpoint, and {checkpoint} is no folder: set {CHECKPOINT} to the folder of one"
        raise MetricUnavailable(msg)
    library = _library("bleurt.score", "BLEURT", "clone google-research/bleurt, then pip install ./bleurt")
    forms = dart_forms(outputs, references)
    scores = library.BleurtScorer(str(checkpoint)).score(
        references=[own[0] for own in forms.references], candidates=forms.outputs
    )
    return {"BLEURT": _value(scores, f"bleurt, checkpoint {checkpoint.name}, first reference, texts in DART's form")}


def _library(module: str, metric: str, advice: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        msg = f"{metric} needs {module}, which is not installed or lacks a package ({e}): {advice}"
        raise MetricUnavailable(msg) from e


def _weights(model: str, metric: str) -> Path:
    """Folder of the weights of a model in the cache of Hugging Face; nothing is downloaded.

    Raises:
        MetricUnavailable: If the cache has no weights of the model.
    """
    if Path(model).is_dir():
        return Path(model)
    hub = importlib.import_module("huggingface_hub")
    config = hub.try_to_load_from_cache(model, "config.json")
    for name in WEIGHTS:
        found = hub.try_to_load_from_cache(model, name)
        if isinstance(found, str) and isinstance(config, str):
            return Path(found).parent
    msg = f"{metric} needs the weights of {model}, which are not in the cache: fetch them with hf download {model}"
    raise MetricUnavailable(msg)


def _value(scores: Sequence[float], tool: str) -> MetricValue:
    mean = sum(map(float, scores)) / len(scores)
    return MetricValue(mean, f"{mean:.2f}", tool)
