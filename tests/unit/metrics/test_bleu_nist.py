"""BLEU and NIST against what the official scripts printed, and their properties."""

from __future__ import annotations

import json
import re
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import shared
from metric_texts import FEW, PAIRS, TEXT
from official import SCORES, TEXTS, part, texts
from prefixfast.errors import ConfigError
from prefixfast.metrics import bleu as module
from prefixfast.metrics.bleu import bleu, bleu_totto, multi_bleu, multi_bleu_lc
from prefixfast.metrics.forms import Forms
from prefixfast.metrics.nist import nist
from prefixfast.metrics.result import MetricUnavailable

ALL = (bleu, nist, multi_bleu, multi_bleu_lc, bleu_totto)


def value(function, outputs, references) -> float:
    return next(iter(function(outputs, references).values())).value


@pytest.mark.parametrize("name", TEXTS)
def test_e2e_s_script(name):
    found = bleu(*texts(name)) | nist(*texts(name))
    assert {k: v.text for k, v in found.items()} == {k: SCORES[name]["e2e"][k] for k in ("BLEU", "NIST")}


@pytest.mark.parametrize(("name", "subset"), [(n, s) for n in TEXTS for s in SCORES[n]["webnlg2017"]])
def test_webnlg_s_script(name, subset):
    printed = re.match(r"BLEU = ([\d.]+),", SCORES[name]["webnlg2017"][subset]["BLEU"])
    assert multi_bleu_lc(*part(name, subset))["BLEU"].text == printed[1]


@pytest.mark.parametrize("name", TEXTS)
def test_dart_s_script(name):
    printed = re.match(r"BLEU = ([\d.]+),", SCORES[name]["dart"]["BLEU"])
    assert multi_bleu(*texts(name))["BLEU"].text == printed[1]


@pytest.mark.parametrize("name", ["example", "nlg10m-prefixfast", "nlg10m-peft", "nlg10m-none"])
def test_outputs_of_the_shared_folder(name):
    folder = shared.folder("metrics")
    outputs = (folder / f"{name}-hyp.txt").read_text(encoding="utf8").split("\n")[:-1]
    groups = (folder / f"{name.split('-')[0]}-refs.txt").read_text(encoding="utf8").strip("\n").split("\n\n")
    found = bleu(outputs, [g.split("\n") for g in groups]) | nist(outputs, [g.split("\n") for g in groups])
    printed = json.loads((folder / "scores.json").read_text(encoding="utf8"))[name]
    assert {k: v.text for k, v in found.items()} == {k: printed[k] for k in found}


# Printed by mteval-v13a-sig.pl and multi-bleu.perl for texts on which libraries differ from them.
@pytest.mark.parametrize(
    ("outputs", "references", "expected"),
    [
        (["no word"], [["is the same here"]], (0.1839, 0.0)),  # smoothed
        (["the cat"], [["the cat"]], (1.0, 1.0)),  # orders without n-grams count as matched
        (["CAFÉ here now x"], [["café here now x"]], (0.5946, 1.5)),  # É keeps its case
        (["0 b c d 0 b"], [["0 b c d 0 b", "0 d b"]], (1.0, 3.5816)),  # the word 0 before another
        ([""], [["a b"]], (0.0, 0.0)),
    ],
)
def test_texts_on_which_libraries_differ(outputs, references, expected):
    found = bleu(outputs, references)["BLEU"].text, nist(outputs, references)["NIST"].text
    assert found == tuple(f"{x:.4f}" for x in expected)


def test_multi_bleu_takes_an_absent_reference_for_an_empty_one():
    """Six words are nearer to none than to thirteen. DART's script has three files, WebNLG's as many as needed."""
    outputs, references = ["a b c d e f", "x y z w v"], [["a b c d e f g h i j k l m"], ["x y z w v"]]
    assert multi_bleu(outputs, references)["BLEU"].text == "100.00"
    assert multi_bleu_lc(outputs, references)["BLEU"].text == "52.92"
    assert multi_bleu(outputs[:1], references[:1])["BLEU"].text == "0.00"


def test_totto_s_script_compares_with_null():
    """Printed by sacrebleu 2.6.0's command line for these texts and the files that ToTTo's script writes."""
    outputs = ["The cat sat on the mat .", "A null thing of that sort"]
    found = bleu_totto(outputs, [["the cat sat on a mat.", "A cat sat on the mat."], ["null things of this sort"]])
    assert found["BLEU"].text == "58.8"
    assert "case:mixed" in found["BLEU"].tool


@FEW
@given(PAIRS, st.randoms())
def test_order_of_texts_and_references(pairs, random):
    pairs = [(o, r[:3]) for o, r in pairs]  # the scripts of WebNLG and DART read the first three
    shuffled = [(o, random.sample(r, len(r))) for o, r in random.sample(pairs, len(pairs))]
    given_order, other_order = (tuple(map(list, zip(*p, strict=True))) for p in (pairs, shuffled))
    for function in (bleu, nist, multi_bleu, bleu_totto):
        assert value(function, *other_order) == pytest.approx(value(function, *given_order), rel=1e-12)


@FEW
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=2)), min_size=1, max_size=5))
def test_a_reference_as_output_is_the_maximum(pairs):
    """NIST has no fixed maximum; for single references no output has more."""
    outputs = [o for o, _ in pairs]
    references = [[o, *more] for o, more in pairs]
    assert value(bleu, outputs, references) == pytest.approx(1)
    assert value(multi_bleu, outputs, references) == pytest.approx(100 if enough_words(outputs) else 0)
    own = [[o] for o in outputs]
    assert value(nist, outputs, own) >= value(nist, outputs[1:] + outputs[:1], own) - 1e-9


def enough_words(outputs) -> bool:
    return any(len(o) >= 4 for o in (re.findall(r"\w+|[^\w\s]", t) for t in outputs))


@FEW
@given(PAIRS)
def test_a_reference_twice_changes_nothing(pairs):
    """NIST counts the words of all references, so that it stays only if every reference comes twice."""
    outputs, references = map(list, zip(*pairs, strict=True))
    longer = [[*r, r[0]] for r in references]
    assert value(bleu, outputs, longer) == value(bleu, outputs, references)
    twice = [r * 2 for r in references]
    assert value(nist, outputs, twice) == pytest.approx(value(nist, outputs, references), rel=1e-9)


@FEW
@given(PAIRS)
def test_more_references_never_lower_bleu_s_precision(pairs):
    outputs, references = map(list, zip(*pairs, strict=True))
    assume(all(o.strip() for o in outputs))
    counts = [module._counts(outputs, refs) for refs in (references, [r[:1] for r in references])]
    assert all(more >= one for more, one in zip(counts[0].matching, counts[1].matching, strict=True))
    assert counts[0].total == counts[1].total


@pytest.mark.parametrize("function", ALL)
def test_texts_without_words(function):
    assert value(function, ["", " \t", "\N{NO-BREAK SPACE}"], [["a b"], ["c", "d e"], ["f"]]) == 0
    assert value(function, ["", "a b c d e"], [["x y"], ["a b c d e"]]) > 0


@pytest.mark.parametrize("function", ALL)
def test_another_number_of_references_is_refused(function):
    with pytest.raises(ConfigError, match="2 texts and 3 lists of references"):
        function(["a", "b"], [["a"], ["b"], ["c"]])


@pytest.mark.parametrize("function", [bleu, multi_bleu, multi_bleu_lc, bleu_totto])
def test_without_sacrebleu(function, monkeypatch):
    for name in ("sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MetricUnavailable, match=r"pip install 'prefixfast\[eval\]'"):
        function(["a"], [["a"]])


def test_multi_bleu_equals_sacrebleu_where_lengths_are_usual():
    sacrebleu = pytest.importorskip("sacrebleu.metrics")
    forms = Forms(["a b c d e", "the cat sat on it"], [["a b c d f", "a b c d"], ["the cat sat on the mat", "x"]])
    columns = [list(c) for c in zip(*forms.references, strict=True)]
    theirs = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(forms.outputs, columns)
    assert module._multi_bleu(forms, 2, "").value == pytest.approx(theirs.score, rel=1e-12)
