"""Translation edit rate (TER, Snover et al. 2006) of Tercom, as the scripts of WebNLG and DART compute it."""

from __future__ import annotations

from prefixfast.io.progress import track
from prefixfast.metrics.forms import Forms, dart_forms, webnlg_forms
from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Scores, Tables, Texts
from prefixfast.metrics.tercom import num_edits

TOOL = "port of Tercom 0.7.25 (beam 20, shifts of 10 words over 50)"


def ter(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """TER as DART's script computes it: edits to the nearest reference, over the mean length of the references.

    The first three references of a text count.

    Raises:
        MetricUnavailable: If no reference has a word.
    """
    return {"TER": _value(dart_forms(outputs, references), "texts in DART's form, three references")}


def ter_webnlg(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """TER as WebNLG's script of 2017 computes it, on texts in ASCII.

    The first three references of a text count.

    Raises:
        MetricUnavailable: If no reference has a word, or a character needs Unidecode, which is not installed.
    """
    return {"TER": _value(webnlg_forms(outputs, references), "texts in WebNLG's form, three references")}


def _value(forms: Forms, form: str) -> MetricValue:
    edits, words = 0, 0.0
    with track(zip(forms.outputs, forms.references, strict=True), "TER", len(forms.outputs), "texts") as each:
        for output, own in each:
            texts = [tuple(text.split()) for text in own]
            edits += min(num_edits(tuple(output.split()), text) for text in texts)
            words += sum(map(len, texts)) / len(texts)
    if not words:
        msg = "TER: expected a reference with a word, got empty references"
        raise MetricUnavailable(msg)
    return MetricValue(edits / words, f"{edits / words:.2f}", f"{TOOL}, {form}")
