"""METEOR, ROUGE-L and CIDEr against what E2E's script printed, their properties, and what they need."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shared
from metric_texts import FEW, PAIRS
from official import SCORES, TEXTS, texts
from prefixfast.errors import ConfigError
from prefixfast.metrics import coco, java
from prefixfast.metrics.coco import cider, meteor, rouge_l
from prefixfast.metrics.evaluate import evaluate
from prefixfast.metrics.result import MetricUnavailable

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
NLG = ("nlg10m-prefixfast", "nlg10m-peft", "nlg10m-none")
long = pytest.mark.long


def printed(functions, outputs, references) -> dict[str, str]:
    return {k: v.text for f in functions for k, v in f(outputs, references).items()}


def value(function, outputs, references) -> float:
    return next(iter(function(outputs, references).values())).value


@needs_java
@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("plain", (meteor, rouge_l, cider)),
        ("edge", (rouge_l, cider)),
        pytest.param("edge", (meteor,), marks=long),  # METEOR starts in about 5 seconds
    ],
)
def test_e2e_s_script(name, functions, monkeypatch):
    """Also where Java takes a decimal comma from LANG=de_DE.UTF-8, which these options stand for."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    found = printed(functions, *texts(name))
    assert found == {k: SCORES[name]["e2e"][k] for k in found}


@needs_java
@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("example", (rouge_l, cider)),
        *(pytest.param(n, (meteor, rouge_l, cider), marks=long) for n in ("example", *NLG)),
    ],
)
def test_outputs_of_the_shared_folder(name, functions):
    folder = shared.folder("metrics")
    outputs = (folder / f"{name}-hyp.txt").read_text(encoding="utf8").split("\n")[:-1]
    groups = (folder / f"{name.split('-')[0]}-refs.txt").read_text(encoding="utf8").strip("\n").split("\n\n")
    found = printed(functions, outputs, [g.split("\n") for g in groups])
    scores = json.loads((folder / "scores.json").read_text(encoding="utf8"))[name]
    assert found == {k: scores[k] for k in found}


@needs_java
def test_a_text_is_one_line_of_the_tokenizer():
    breaks = "a\nb\rc\vd\fe\x85f\u2028g\u2029h\x1ci\r\nj"
    lines = java.ptb_lines([breaks, "", "a ||| B", "\N{NO-BREAK SPACE}", "Café 5\ud800", ""])
    assert lines == ["a b c d e f g h i j", "", "a | | | b", "", "café 5 ?", ""]
    assert java.ptb_lines(["a", "b"]) == ["a", "b"]


@needs_java
def test_the_tokenizer_looks_at_the_next_text():
    """Texts come in the order of the script, since a period after an abbreviation can depend on the next text."""
    assert java.ptb_lines(["It is 5 m.", "Red pea"]) == ["it is 5 m.", "red pea"]
    assert java.ptb_lines(["It is 5 m.", "The end"]) == ["it is 5 m .", "the end"]


@needs_java
@long
def test_meteor_in_a_folder_with_spaces(tmp_path, monkeypatch):
    """A text with a line break or the separator of METEOR's protocol is one text.

    The value is what the class of pycocoevalcap gives for the same tokens.
    """
    folder = tmp_path / "a b+c"
    shutil.copytree(java.jar(java.METEOR_JAR).parents[1] / "meteor", folder / "meteor")
    real = java.jar
    monkeypatch.setattr(java, "jar", lambda name: folder / name if name == java.METEOR_JAR else real(name))
    found = meteor(["a kitty ||| sat\nhere", ""], [["a cat ||| sat here", "|||"], ["\n"]])["METEOR"]
    assert found.value == pytest.approx(0.44430433966616706, rel=1e-12)


@needs_java
@long
def test_properties_of_meteor():
    outputs, references = texts("plain")
    score = value(meteor, outputs, references)
    backwards = value(meteor, outputs[::-1], [own[::-1] for own in references[::-1]])
    assert backwards == pytest.approx(score, rel=1e-12)
    assert value(meteor, outputs, [[*own, own[0]] for own in references]) == pytest.approx(score, rel=1e-12)
    assert value(meteor, outputs, [[o] for o in outputs]) == 1
    assert value(meteor, [""] * len(outputs), references) == 0


@pytest.fixture
def words(monkeypatch) -> None:
    """Tokens between spaces, without Java."""
    monkeypatch.setattr(coco, "ptb_lines", lambda lines: [" ".join(line.lower().split()) for line in lines])
    coco._tokenized.cache_clear()
    yield
    coco._tokenized.cache_clear()


@pytest.mark.usefixtures("words")
class TestProperties:
    @FEW
    @given(PAIRS, st.randoms())
    def test_order_of_texts_and_references(self, pairs, random):
        shuffled = [(o, random.sample(r, len(r))) for o, r in random.sample(pairs, len(pairs))]
        for function in (rouge_l, cider):
            found = [value(function, *map(list, zip(*p, strict=True))) for p in (pairs, shuffled)]
            assert found[0] == pytest.approx(found[1], rel=1e-9)

    @FEW
    @given(PAIRS)
    def test_a_reference_as_output(self, pairs):
        references = [r for _, r in pairs]
        assert value(rouge_l, [r[-1] for r in references], references) == pytest.approx(1)
        own = [r[:1] for r in references]
        best = value(cider, [r[0] for r in own], own)
        assert best >= value(cider, [o for o, _ in pairs], own) - 1e-9
        assert best <= 10 + 1e-9

    @FEW
    @given(PAIRS)
    def test_a_reference_twice(self, pairs):
        """CIDEr is a mean over references, so that it stays only if every reference comes twice."""
        outputs, references = map(list, zip(*pairs, strict=True))
        assert value(rouge_l, outputs, [[*r, r[0]] for r in references]) == value(rouge_l, outputs, references)
        assert value(cider, outputs, [r * 2 for r in references]) == pytest.approx(value(cider, outputs, references))

    def test_texts_without_words(self):
        assert value(rouge_l, ["", " "], [["a b"], ["c"]]) == 0
        assert value(cider, ["", "x"], [["a b"], ["c"]]) == 0
        assert value(cider, ["", "x"], [[""], [" "]]) == 0

    @pytest.mark.parametrize("function", [meteor, rouge_l, cider])
    def test_another_number_of_references_is_refused(self, function):
        with pytest.raises(ConfigError, match="2 texts and 1 lists of references"):
            function(["a", "b"], [["a"]])


@pytest.mark.parametrize("function", [meteor, rouge_l, cider])
def test_without_java_or_the_package(function, monkeypatch, tmp_path):
    coco._tokenized.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MetricUnavailable, match="install a Java runtime"):
        function(["a"], [["a"]])
    monkeypatch.setattr(java, "java", lambda: "java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(MetricUnavailable, match=r"pip install 'prefixfast\[meteor\]'"):
        function(["a"], [["a"]])


@pytest.mark.parametrize(
    ("answer", "message"),
    [("print('Error: no stats', flush=True)", "Error: no stats"), ("sys.exit('out of memory')", "out of memory")],
)
@pytest.mark.usefixtures("words")
def test_meteor_that_fails_is_ended(answer, message, monkeypatch, tmp_path):
    program = tmp_path / "java"
    program.write_text(f"#!{sys.executable}\nimport sys, time\nsys.stdin.readline()\n{answer}\ntime.sleep(600)\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(MetricUnavailable, match=message):
        meteor(["a"], [["a"]])
    assert [p.poll() is not None and p.stdin.closed and p.stdout.closed for p in started] == [True]


# Programs that no shell starts, and answers that are no text or no number.
BROKEN = {
    "of another system": b"\x7fELF none",
    "bytes": b"#!/bin/sh\nprintf '\\377\\n'",
    "no number": b"#!/bin/sh\n" + b"echo 'Final score: x'\n" * 9,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("task", ["e2e", "webnlg"])
def test_a_java_that_cannot_run_is_a_named_gap(name, task, monkeypatch, tmp_path):
    coco._tokenized.cache_clear()
    program = tmp_path / "java"
    program.write_bytes(BROKEN[name])
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if name == "no number":
        monkeypatch.setattr(coco, "ptb_lines", list)
    found = evaluate(["a"], ["a"], task=task)
    assert "METEOR" in found.missing
    assert {"BLEU", "length"} <= {*found}


@pytest.mark.parametrize("task", ["e2e", "webnlg"])
def test_no_folder_for_temporary_files_is_a_named_gap(task, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(coco, "ptb_lines", list)
    coco._tokenized.cache_clear()
    found = evaluate(["b"], ["b"], task=task)
    assert "METEOR" in found.missing
    assert "BLEU" in found


def test_a_package_without_metadata(monkeypatch):
    monkeypatch.setattr(java, "version", lambda package: None)
    assert java.package() == "pycocoevalcap of unknown version"


def test_a_tokenizer_that_fails(monkeypatch):
    monkeypatch.setattr(java, "java", lambda: "/bin/false" if Path("/bin/false").exists() else "false")
    with pytest.raises(MetricUnavailable, match="for 1 texts: no message"):
        java.ptb_lines(["a"])


def test_every_set_has_scores():
    assert set(TEXTS) == set(SCORES)
