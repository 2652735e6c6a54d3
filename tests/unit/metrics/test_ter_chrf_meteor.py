"""TER, chrF and METEOR against what the official scripts printed, and their properties."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metric_texts import FEW, PAIRS, TEXT
from official import SCORES, TEXTS, part, texts
from prefixfast.metrics import java, meteor_cli
from prefixfast.metrics.chrf import chrf
from prefixfast.metrics.meteor_cli import meteor_dart, meteor_webnlg
from prefixfast.metrics.result import MetricUnavailable
from prefixfast.metrics.ter import ter, ter_webnlg
from prefixfast.metrics.tercom import align, num_edits

PARTS = [(n, s) for n in TEXTS for s in SCORES[n]["webnlg2017"]]
has_meteor = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs Java and pycocoevalcap",
)


def value(function, outputs, references) -> float:
    return next(iter(function(outputs, references, None).values())).value


# ---- what the scripts printed ----


@pytest.mark.parametrize(("name", "subset"), PARTS)
def test_ter_of_webnlg_s_script(name, subset):
    printed = float(SCORES[name]["webnlg2017"][subset]["TER"].split()[0])
    assert value(ter_webnlg, *part(name, subset)) == pytest.approx(printed, rel=1e-15)


@pytest.mark.parametrize("name", TEXTS)
def test_ter_of_dart_s_script(name):
    assert value(ter, *texts(name)) == pytest.approx(float(SCORES[name]["dart"]["TER"].split()[0]), rel=1e-15)


@pytest.mark.parametrize("name", TEXTS)
def test_chrf_of_webnlg_s_script_of_2020(name):
    outputs, references = texts(name)
    found = chrf(outputs, [own[:4] for own in references], None)
    for score in ("chrF++", "chrF"):
        total = SCORES[name]["webnlg2020"][score][0]
        assert found[score].value == pytest.approx(total, rel=1e-14)
        assert found[score].text == f"{round(total, 2):g}"


@has_meteor
def test_meteor_of_webnlg_s_script(monkeypatch):
    """Also where Java takes the letters of lower case from LANG=tr_TR.UTF-8, which these options stand for."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    found = meteor_webnlg(*texts("plain"), None)["METEOR"]
    printed = float(SCORES["plain"]["webnlg2017"]["all"]["METEOR"])
    assert (found.value, found.text) == (printed, f"{printed:.2f}")
    assert "-l en -norm -r 3" in found.tool


@has_meteor
@pytest.mark.long
@pytest.mark.parametrize("name", TEXTS)
def test_meteor_of_dart_s_script(name):
    found = meteor_dart(*texts(name), None)["METEOR"]
    assert found.value == float(SCORES[name]["dart"]["METEOR"])
    assert "-l en -norm -r 8" in found.tool


@has_meteor
@pytest.mark.long
@pytest.mark.parametrize(("name", "subset"), PARTS)
def test_meteor_of_each_part_of_webnlg(name, subset):
    assert value(meteor_webnlg, *part(name, subset)) == float(SCORES[name]["webnlg2017"][subset]["METEOR"])


# Printed by tercom.7.25.jar for texts of the DART repository on which sacrebleu's TER differs from it.
@pytest.mark.parametrize(
    ("output", "reference", "edits"),
    [
        (
            "juan carlos i of spain was preceded by francisco franco .",
            "francisco franco was the predecessor of juan carlos i of spain .",
            6,
        ),
        ("b c a", "a b c", 1),
        ("d e c a b", "a b c d e", 2),
        ("x x x", "y", 3),
        ("the the the the", " ".join(map(str, range(30))), 30),  # wider than the beam
    ],
)
def test_edits_of_tercom(output, reference, edits):
    assert num_edits(tuple(output.split()), tuple(reference.split())) == edits


# ---- properties ----


def levenshtein(a, b) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


SHORT = st.lists(st.sampled_from("abcd"), max_size=9).map(tuple)


@FEW
@given(SHORT, SHORT)
def test_shifts_save_edits(output, reference):
    """Shifts never cost more than they save, and texts of the same words differ at most in their order."""
    distance = levenshtein(output, reference)
    assert align(output, reference)[0] == distance
    fewest = max(len(output), len(reference)) - sum(
        min(output.count(w), reference.count(w)) for w in {*output, *reference}
    )
    assert fewest <= num_edits(output, reference) <= distance
    assert num_edits(reference, reference) == 0


@FEW
@given(PAIRS, st.randoms())
def test_order_of_texts_and_references(pairs, random):
    pairs = [(o, r[:3]) for o, r in pairs]
    assume(any(text.strip() for _, own in pairs for text in own))
    moved = random.sample(pairs, len(pairs))
    shuffled = [(o, random.sample(r, len(r))) for o, r in moved]
    same, texts_moved, all_moved = (tuple(map(list, zip(*p, strict=True))) for p in (pairs, moved, shuffled))
    assert value(ter, *all_moved) == pytest.approx(value(ter, *same), rel=1e-12)
    # The first of equally good references counts for chrF, as in WebNLG's script.
    assert value(chrf, *texts_moved) == pytest.approx(value(chrf, *same), rel=1e-12)


@FEW
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=2)), min_size=1, max_size=4))
def test_a_reference_as_output_is_the_best(pairs):
    outputs, references = [o for o, _ in pairs], [[o, *more] for o, more in pairs]
    assert value(ter, outputs, references) == 0
    assert value(chrf, outputs, [[o] for o in outputs]) <= 1 + 1e-12


@FEW
@given(st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=4))
def test_empty_outputs(references):
    """Tercom deletes the shortest reference of each text."""
    outputs = [""] * len(references)
    lengths = [[len(num_words(text)) for text in own] for own in references]
    assume(any(map(any, lengths)))
    expected = sum(map(min, lengths)) / sum(sum(own) / len(own) for own in lengths)
    assert value(ter, outputs, references) == pytest.approx(expected)
    assert value(chrf, outputs, references) == pytest.approx(0, abs=1e-12)


def num_words(text: str) -> list[str]:
    from prefixfast.metrics.forms import dart_forms

    return dart_forms([""], [[text]]).references[0][0].split()


def test_a_further_reference_lowers_the_edits():
    assert value(ter, ["a b c"], [["a x y"]]) == pytest.approx(2 / 3)
    assert value(ter, ["a b c"], [["a x y", "a b c d"]]) == pytest.approx(1 / 3.5)


@pytest.mark.parametrize("function", [ter, ter_webnlg])
def test_references_without_words_are_refused(function):
    with pytest.raises(MetricUnavailable, match="a reference with a word"):
        function(["a"], [[" "]], None)


# ---- what is missing ----


def test_meteor_without_java(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(MetricUnavailable, match=r"install a Java runtime|needs pycocoevalcap"):
        meteor_dart(["a"], [["a"]], None)


def test_meteor_without_pycocoevalcap(monkeypatch):
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MetricUnavailable, match=r"prefixfast\[meteor\]"):
        meteor_dart(["a"], [["a"]], None)


@has_meteor
@pytest.mark.parametrize(
    ("status", "out"), [(1, ""), (0, ""), (0, "Final score: none of it\nError"), (1, "Final score: 1")]
)
def test_a_java_that_fails(monkeypatch, status, out):
    done = subprocess.CompletedProcess([], status, out, "no memory")
    monkeypatch.setattr(meteor_cli.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(MetricUnavailable, match=f"status {status}: no memory"):
        meteor_dart(["a"], [["a"]], None)


def test_chrf_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MetricUnavailable, match=r"prefixfast\[eval\]"):
        chrf(["a"], [["a"]], None)


def test_the_files_of_meteor(monkeypatch, tmp_path):
    """One line for each output, and as many lines of references as the option says, empty ones at the end."""
    seen = {}

    def run(command, **_):
        texts_file, groups = command[command.index("-jar") + 2 :][:2]
        seen.update(
            options=command[command.index("-r") :][:2],
            texts=Path(texts_file).read_text(encoding="utf8"),
            groups=Path(groups).read_text(encoding="utf8"),
        )
        return subprocess.CompletedProcess(command, 0, "Final score:  0.25\n", "")

    monkeypatch.setattr(java, "java", lambda: "java")
    monkeypatch.setattr(java, "jar", lambda name: tmp_path / name)
    monkeypatch.setattr(meteor_cli, "package", lambda: "pycocoevalcap")
    monkeypatch.setattr(meteor_cli.subprocess, "run", run)
    assert value(meteor_webnlg, ["Ça va\nbien.", ""], [["Oui.", "b", "c", "d"], ["e"]]) == 0.25
    assert seen["options"] == ["-r", "3"]
    assert seen["texts"] == "ca va bien .\n\n"
    assert seen["groups"] == "oui .\nb\nc\ne\n\n\n"
