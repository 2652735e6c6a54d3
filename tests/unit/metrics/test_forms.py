"""Forms of texts before they are compared, against the files that WebNLG's script wrote."""
# ruff: noqa: RUF001 - dashes and quotation marks are what is tested

from __future__ import annotations

import sys
import types

import pytest

from official import TEXTS, texts
from prefixfast.errors import ConfigError
from prefixfast.metrics.ascii_form import ascii_form
from prefixfast.metrics.forms import check_texts, dart_forms, webnlg_forms
from prefixfast.metrics.result import MetricUnavailable


@pytest.mark.parametrize("name", TEXTS)
def test_webnlg_forms_are_those_of_the_script(name):
    found, written = webnlg_forms(*texts(name)), TEXTS[name]["webnlg_form"]
    assert found.outputs == written["outputs"]
    assert found.references == [[r for r in own if r] for own in written["references"]]


def test_outputs_are_turned_into_ascii_before_they_are_split_and_references_after():
    assert webnlg_forms(["5° – ½ ß"], [["5° – ½ ß"]]) == (["5deg - 1 / 2 ss"], [["5 deg -  1/2 ss"]])


def test_dart_forms_are_those_of_its_reference_files():
    """A text in that form already stays as it is."""
    outputs = ["The Atatürk Monument (İzmir) has 5\N{NO-BREAK SPACE}steps.", "Hawaii Five-O, 71-69=276"]
    forms = dart_forms(outputs, [["a"], ["b", "c", "d", "e"]])
    assert forms.outputs == ["the atatürk monument ( i̇zmir ) has 5 steps .", "hawaii five - o , 71 - 69 = 276"]
    assert forms.references == [["a"], ["b", "c", "d"]]
    assert dart_forms(forms.outputs[1:], [["a"]]).outputs == forms.outputs[1:]


def test_ascii_forms_of_unidecode():
    text = "Şiłøæ “ğ” ’ £€ → … İ ạ e\N{COMBINING ACUTE ACCENT} ¼"
    assert ascii_form(text) == 'Siloae "g" \' PSEUR - ... I a e  1/4'
    assert ascii_form("half\N{REPLACEMENT CHARACTER} \N{MINUS SIGN}5\N{THIN SPACE}m") == "half -5 m"


def test_other_characters_need_unidecode(monkeypatch):
    monkeypatch.setitem(sys.modules, "unidecode", None)
    with pytest.raises(MetricUnavailable, match=r"U\+0416.*pip install Unidecode"):
        ascii_form("Ж")
    module = types.ModuleType("unidecode")
    module.unidecode = {"Ж": "Zh"}.get
    monkeypatch.setitem(sys.modules, "unidecode", module)
    try:
        assert ascii_form("Ж ok") == "Zh ok"
    finally:
        from prefixfast.metrics.ascii_form import _form

        _form.cache_clear()


@pytest.mark.parametrize(
    ("outputs", "references", "message"),
    [
        (["a", "b"], [["a"]], "2 texts and 1 lists"),
        ([], [], "got none"),
        (["a", "b"], [["a"], []], "text 2: expected a list of at least one reference"),
        (["a"], ["abc"], "text 1: expected a list of at least one reference"),
        (["a"], [["a", None]], "text 1: expected a list of at least one reference"),
        ([None], [["a"]], "text 1: expected a str, got NoneType"),
    ],
)
def test_texts_that_cannot_be_scored(outputs, references, message):
    with pytest.raises(ConfigError, match=message):
        check_texts(outputs, references)
