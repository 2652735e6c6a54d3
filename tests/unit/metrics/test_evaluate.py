"""`evaluate` and `prefixfast eval`: forms of outputs and references, pairs, subsets, choice of metrics, gaps."""

from __future__ import annotations

import dataclasses
import datetime
import gzip
import json
import socket
from pathlib import Path

import numpy as np
import pytest

import shared
from prefixfast import ConfigError, DataError, Generation, evaluate
from prefixfast.metrics import evaluate as module
from prefixfast.metrics.registry import METRICS, better_side
from prefixfast.metrics.result import Metrics, MetricUnavailable, MetricValue
from prefixfast.metrics.tasks import TASK_METRICS

LENGTHS = ["length", "reference length"]


def lengths(outputs, references, task="e2e", split=None) -> tuple[float, float]:
    found = evaluate(outputs, references, task=task, metrics=LENGTHS, split=split)
    return found["length"], found["reference length"]


def generation(text: str, **more) -> Generation:
    return Generation(0, more.get("id"), text, [text], [], "stop", None, None, None, {}, more.get("error"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture
def write(tmp_path):
    """Function that writes a file and returns its path."""

    def make(name: str, text: str) -> Path:
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return tmp_path / name

    return make


# ---- tables of metrics ----


def test_the_metrics_of_each_task_exist():
    assert {name for names in TASK_METRICS.values() for name in names} <= set(METRICS)
    assert all(metric.name == name and metric.scores for name, metric in METRICS.items())
    for names in TASK_METRICS.values():
        scores = [s for name in names for s in METRICS[name].names]
        assert len(scores) == len({s.lower() for s in scores})


SIDES = {
    "higher": "BLEU,NIST,METEOR,ROUGE_L,CIDEr,ROUGE-1,ROUGE-2,ROUGE-L,chrF++,chrF,MoverScore,BERTScore,BLEURT,"
    "slot coverage",
    "lower": "TER,omissions,wrong slots,empty",
    None: "length,reference length,distinct-1,distinct-2",
}


def test_the_better_side_of_every_score():
    found: dict = {}
    for metric in METRICS.values():
        for score in metric.scores:
            found.setdefault(score.name, set()).add(score.better)
            assert better_side(score.name) == better_side(f"{score.name} unseen topics") == score.better
    assert found == {name: {side} for side, names in SIDES.items() for name in names.split(",")}
    assert better_side("lengthy") is better_side("BLEUX") is None


# ---- outputs ----

TEXTS = ["a b", "c"]


@pytest.mark.parametrize(
    "outputs",
    [
        TEXTS,
        tuple(TEXTS),
        [generation(t) for t in TEXTS],
        [{"text": t, "output": t, "prediction": None} for t in TEXTS],
        [{"text": t, "input": "another column"} for t in TEXTS],
        [{"prediction": t} for t in TEXTS],
    ],
    ids=["texts", "tuple", "generations", "equal columns", "rows", "rows of another system"],
)
def test_outputs(outputs):
    assert lengths(outputs, TEXTS) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a b\nc\n"),
        ("a.txt", "a b\r\nc"),
        ("hypothesis", "a b\nc\n"),
        ("team.test_beam", "a b\nc\n"),
        ("gen.target", "a b\nc\n"),
        ("gen.source", "a b\nc\n"),
        ("gen.story.gz", "a b\nc\n"),
        ("a.jsonl", '{"text": "a b"}\n{"text": "c"}\n'),
        ("a.csv", "id,text\n1,a b\n2,c\n"),
        ("a.json", '[{"output": "a b"}, {"output": "c"}]'),
    ],
)
def test_files_of_outputs(write, name, text):
    assert lengths(write(name, text), TEXTS) == lengths(str(write(name, text)), TEXTS) == (1.5, 1.5)


def test_lines_end_at_line_breaks_alone(write):
    """Other readers end a line at these characters too, and would pair all later texts wrongly."""
    assert lengths(write("a.txt", "a\x0cb\n\nc\u2028d\x85e\n"), ["x", "y", "z"])[0] == 5 / 3


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (3, ConfigError, "outputs: expected a path"),
        ({"text": "a"}, ConfigError, "outputs: expected a path"),
        ([1, "a"], DataError, "outputs: text 0: expected a string"),
        ([{"txt": "a"}], DataError, "outputs: row 0: expected one of the keys text, output"),
        ([{"text": None}], DataError, "outputs: row 0: text: expected a string, got None"),
        ([{"text": "the input", "prediction": "a"}], DataError, "got text and prediction; remove all but one"),
        ([{"output": "a", "hypothesis": ""}], DataError, "got output and hypothesis; remove all but one"),
        ([{"text": 3}], DataError, "text: expected a string, got 3"),
        (["\ud800"], DataError, "half a surrogate pair"),
        ([generation("", error="RequestError: too long")], DataError, "too long"),
        ([{"text": "", "error": "too long"}], DataError, "too long"),
        ("none.txt", DataError, "none.txt: cannot be read"),
        ("none.xlsx", DataError, "spreadsheet"),
        ([], DataError, "got 0 outputs and 1 groups"),
    ],
)
def test_wrong_outputs(outputs, error, message):
    with pytest.raises(error, match=message):
        lengths(outputs, ["a"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,id\na b,1\n,2\n"),
        ("a.csv", 'text\na b\n""\n'),
        ("a.tsv.gz", "id\ttext\n1\ta b\n2\t\n"),
        ("a.csv", "prediction,text,id\n,a b,1\n,,2\n"),
        ("a.jsonl", '{"text": "a b"}\n{"text": ""}\n'),
        ("a.txt", "a b\n\n"),
    ],
)
def test_an_empty_output_is_a_text(write, name, text):
    found = evaluate(write(name, text), ["a b", "c"], task="e2e", metrics=["length", "empty"])
    assert dict(found) == {"length": 1, "empty": 0.5}


@pytest.mark.parametrize("text", ['{"text": "a b"}\n{"text": "c"}\n', '[\n  {"id": 1, "output": "a b"},\n'])
def test_rows_in_a_text_file_are_refused(write, text):
    with pytest.raises(DataError, match=r"a\.txt: expected one text a line, got rows in JSON"):
        lengths(write("a.txt", text), TEXTS)
    with pytest.raises(DataError, match=r"r\.txt: expected one text a line, got rows in JSON"):
        lengths(TEXTS, [write("r.txt", text.replace("text", "ref").replace("output", "ref")), write("s.txt", "a\n")])


def test_texts_that_are_json_are_texts(write):
    assert lengths(write("a.txt", '{"name": 1}\n[1, 2]\n'), TEXTS)[0] == 2


# ---- references ----

GROUPS = [["a b", "c d"], ["e"]]


@pytest.mark.parametrize(
    "references",
    [
        GROUPS,
        [{"refs": g} for g in GROUPS],
        [{"refs": GROUPS[0]}, {"ref": "e"}],
        [{"document": "x", "summaries": GROUPS[0]}, {"document": "y", "summary": "e"}],
    ],
)
def test_references(references):
    assert lengths(TEXTS, references) == (1.5, 5 / 3)


@pytest.mark.parametrize(
    ("files", "task"),
    [
        ({"groups.txt": "a b\nc d\n\ne\n"}, "e2e"),
        ({"groups.txt": "a b\nc d\n\ne\n\n\n"}, "e2e"),
        ({"r0": "a b\ne\n", "r1": "c d\n\n"}, "webnlg"),
        ({"r0": "a b\ne", "r1": "c d\n"}, "webnlg"),  # lines are joined, so that the absent one has no line break
        ({"a.csv": 'mr,ref\n"name[A], x[1]",a b\nname[B],e\n"name[A], x[1]",c d\n'}, "e2e"),
        ({"a.jsonl": '{"mr": "name[A]", "refs": ["a b", "c d"]}\n{"mr": "name[B]", "ref": "e"}\n'}, "e2e"),
        ({"src1_test.txt": "name : A||a b\nname : A||c d\nname : B||e\n"}, "e2e"),
    ],
)
def test_files_of_references(write, files, task):
    paths = [write(*file) for file in files.items()]
    assert lengths(TEXTS, paths if len(paths) > 1 else paths[0], task) == (1.5, 5 / 3)
    assert lengths(TEXTS, paths, task) == (1.5, 5 / 3)


def test_a_file_of_one_reference_a_line(write):
    assert lengths(TEXTS, write("r.txt", "a b c\nd\n")) == (1.5, 2)


# Layouts of `SPLIT.source` and `SPLIT.target` of fairseq's and BART's authors, of EdinburghNLP/XSum and of
# abisee/cnn-dailymail. The articles are invented.
SUMMARY = "[SN]URL[SN]\nu\n[SN]FIRST-SENTENCE[SN]\na b\n[SN]RESTBODY[SN]\nlong text\n"
STORY = "long text\n\n@highlight\n\na b.\n"


@pytest.mark.parametrize("task", ["xsum", "cnn_dailymail", "samsum", "dialogsum", "summary", "e2e"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_target_file_alone_has_one_reference_a_line(write, task, end):
    assert lengths(TEXTS, write(f"test.target{end}", "a b c\n\n"), task) == (1.5, 1.5)
    with pytest.raises(DataError, match=r"got 2 outputs and 3 groups in .*test\.target"):
        lengths(TEXTS, write(f"test.target{end}", "a\nb\nc\n"), task)


@pytest.mark.parametrize("split", [None, "test"])
def test_a_target_file_beside_its_source_file(write, split):
    write("test.source", "one\ntwo\n")
    path = write("test.target", "a b c\nd\n")
    outputs = [{"document": d, "text": t} for d, t in zip(("one", "two"), TEXTS, strict=True)]
    for references in (path, path.with_suffix(".source"), path.parent if split else path):
        assert lengths(outputs, references, "xsum", split) == (1.5, 2)
    with pytest.raises(DataError, match="expected the document of the references"):
        lengths(outputs[::-1], path, "xsum", split)
    assert lengths(outputs, path, "summary") == (1.5, 2)  # whose rows have no documents


@pytest.mark.parametrize(
    ("name", "text", "task"), [("1.summary", SUMMARY, "xsum"), ("1.story", STORY, "cnn_dailymail")]
)
def test_a_file_of_one_document(write, name, text, task):
    path = write(name, text)
    assert lengths(["a"], path, task) == lengths(["a"], path, task, "test") == (1, 2)


@pytest.mark.parametrize("name", ["test.source", "1.story"])
def test_files_of_documents_are_no_references(write, name):
    with pytest.raises(DataError, match=name):
        lengths(["a"], write(name, "a b\n"), "e2e")


@pytest.mark.parametrize(
    ("name", "text", "task"),
    [
        ("r.jsonl", '{"ref": "a b"}\n{"ref": "c"}\n', "e2e"),
        ("r.csv", "ref\na b\nc\n", "e2e"),
        ("r.parquet", "", "e2e"),
        ("r.xml", "<benchmark></benchmark>", "webnlg"),
        ("src1_test.txt", "name : A||a b\nname : B||e\n", "e2e"),
        ("1.summary", SUMMARY, "xsum"),
        ("r.docx", "", "e2e"),
    ],
)
def test_each_of_several_files_of_references_is_text(cli, write, name, text, task):
    paths = [write("r0.txt", "a b\nc\n"), write(name, text)]
    for files in (paths, paths[::-1], [paths[0].parent, paths[0]]):
        with pytest.raises(DataError, match=r"expected a text file with one line for each text.*; give it alone"):
            lengths(TEXTS, files, task)
    done = cli("eval", write("o.txt", "a b\nc\n"), *paths, "--task", task, "--metrics", "length")
    assert (done.code, done.out) == (1, "")


def test_a_split_is_that_of_the_official_file(write):
    table = write("a.csv", "mr,ref\nname[A],a b\nname[A],c d\n")
    assert lengths(["x"], table, split="dev") == (1, 2)
    assert lengths(["x", "y"], table, split="train") == (1, 2)
    for references in (["a"], write("r.txt", "a\n")):
        with pytest.raises(ConfigError, match="split: expected none"):
            lengths(["x"], references, split="dev")
    with pytest.raises(ConfigError, match="task: expected one of"):
        lengths(["x"], table, task="summary", split="dev")


@pytest.mark.parametrize(
    ("references", "error", "message"),
    [
        (3, ConfigError, "references: expected a path"),
        (["a", []], DataError, "expected a text or a list of texts"),
        (["a", [1]], DataError, r"references: row 1: text\[0\]: expected a string"),
        (["a", {"mr": "x"}], DataError, "references: row 1: expected one of the keys ref, refs"),
        (["a", {"ref": "x", "refs": ["y"]}], DataError, "remove all but one"),
        (["a", {"refs": "['b', 'c']"}], DataError, "is JSON"),
        (["a"], DataError, "got 2 outputs and 1 groups"),
    ],
)
def test_wrong_references(references, error, message):
    with pytest.raises(error, match=message):
        lengths(TEXTS, references)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("a\n\n\nb\n",), r"r0.txt:3: expected a reference, got an empty line"),
        (("\na\n\nb\n",), r"r0.txt:1: expected a reference, got an empty line"),
        (("a\nb\n", "c\n\n\n\n"), "r0.txt: expected 4 lines as in the other files of references, got 2"),
        (("a\n\n", "c\n\n"), "r0.txt:2: expected a reference of this text in one of the files"),
    ],
)
def test_damaged_files_of_references(write, files, message):
    with pytest.raises(DataError, match=message):
        lengths(TEXTS, [write(f"r{i}.txt", text) for i, text in enumerate(files)])


# ---- pairs ----

ROWS = [{"id": 7, "mr": "name[A]", "ref": "a b"}, {"id": 8, "mr": "name[B]", "ref": "c"}]


def test_equal_ids_and_inputs(write):
    """A table holds numbers as text."""
    same = [{"text": t, **{k: r[k] for k in ("id", "mr")}} for t, r in zip(TEXTS, ROWS, strict=True)]
    assert lengths(same, ROWS) == (1.5, 1.5)
    assert lengths(write("o.csv", "id,mr,text\n7,name[A],a b\n8,name[B],c\n"), ROWS) == (1.5, 1.5)
    assert lengths([generation("a b", id=7), generation("c", id="8")], ROWS) == (1.5, 1.5)


DAY = datetime.date(2026, 11, 30)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (np.int64(7), "7"),
        (np.float32(0.5), 0.5),
        (DAY, "2026-11-30"),
        (np.array([1, 2]), [1, 2]),
        ([np.int64(1), DAY], '[1, "2026-11-30"]'),
        (True, "true"),
        (("a",), ["a"]),
    ],
)
def test_ids_of_other_types(ours, theirs):
    """Columns of Parquet files and of data sets hold such values; a table holds them as text."""
    for pair in ((ours, theirs), (theirs, ours)):
        outputs, references = ([{"id": value, key: "a"}] for value, key in zip(pair, ("text", "ref"), strict=True))
        assert lengths(outputs, references) == (1, 1)
        with pytest.raises(DataError, match="expected the id"):
            lengths(outputs, [{"id": "8", "ref": "a"}])


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        ("id", [{"id": 7, "text": "a"}, {"id": 9, "text": "b"}]),
        ("mr", [{"mr": "name[B]", "text": "a"}, {"mr": "name[A]", "text": "b"}]),
    ],
)
def test_other_ids_and_inputs_are_refused(key, rows):
    with pytest.raises(DataError, match=rf"outputs: row \d: expected the {key} of the references at references: row"):
        lengths(rows, ROWS)


def test_the_place_of_a_mismatch_in_files(write):
    outputs = write("o.jsonl", '{"id": 7, "text": "a"}\n{"id": 9, "text": "b"}\n')
    references = write("r.jsonl", "".join(json.dumps({"id": r["id"], "refs": [r["ref"]]}) + "\n" for r in ROWS))
    with pytest.raises(DataError, match=r"o\.jsonl:2: expected the id of the references at .*r\.jsonl:2"):
        lengths(outputs, references)


# ---- subsets ----


def test_seen_and_unseen_texts():
    rows = [{"ref": "a", "subset": s} for s in ("unseen", "seen", "unseen")]
    found = evaluate(["a", "a b", "a b c"], rows, task="webnlg", metrics=["length"])
    assert dict(found) == {"length seen": 2, "length unseen": 2, "length": 2}
    assert list(found) == ["length seen", "length unseen", "length"]
    sides = evaluate(["a"] * 3, rows, task="webnlg", metrics=["TER", "chrF", "lengths"]).values_by_name
    assert all(value.better == better_side(name) for name, value in sides.items())
    assert (sides["TER seen"].better, sides["chrF unseen"].better, sides["length"].better) == ("lower", "higher", None)
    del rows[0]["subset"]
    assert list(evaluate(["a"] * 3, rows, task="webnlg", metrics=["length"])) == ["length"]


def test_wrong_slots_of_a_subset_are_those_of_all_tables():
    rows = [{"mr": f"name[{n}]", "ref": "x", "subset": s} for n, s in (("Mill", "seen"), ("Fan", "unseen"))]
    found = evaluate(["Fan", "Mill"], rows, task="e2e", metrics=["wrong slots"])
    assert dict(found) == {"wrong slots seen": 1, "wrong slots unseen": 1, "wrong slots": 1}


def test_a_subset_without_a_score_is_a_named_gap(monkeypatch):
    monkeypatch.setitem(module.TASK_METRICS, "dart", ("ter", "lengths"))  # METEOR starts slowly
    rows = [{"ref": "a b", "subset": "seen"}, {"ref": "", "subset": "unseen"}]
    for metrics in (["TER", "length"], None):
        found = evaluate(["a b", "c"], rows, task="dart", metrics=metrics)
        assert {"TER", "TER seen", "length unseen"} <= {*found}
        assert "a reference with a word" in found.missing["TER unseen"]
    none = evaluate(["a b"], [[""]], task="dart")
    assert "a reference with a word" in none.missing["TER"]
    assert "length" in none


def test_a_column_of_many_values_is_no_subset():
    counted, lengths_of = [], METRICS["lengths"].function

    def count(outputs, references, tables=None):
        counted.append(len(outputs))
        return lengths_of(outputs, references, tables)

    metric = dataclasses.replace(METRICS["lengths"], function=count)
    for number, calls in ((20, 21), (21, 1)):
        rows = [{"ref": "a", "subset": f"s{i}"} for i in range(number)]
        counted.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module.METRICS, "lengths", metric)
            assert evaluate(["a"] * number, rows, task="e2e", metrics=["length"])["length"] == 1
        assert len(counted) == calls


# ---- metrics ----


@pytest.mark.parametrize(
    ("task", "name", "scores", "tool"),
    [
        ("e2e", "BLEU", ["BLEU"], "mteval"),
        ("webnlg", "bleu", ["BLEU"], "-lc"),
        ("dart", "BLEU", ["BLEU"], "multi-bleu"),
        ("e2e", "TER", ["TER"], "DART"),
        ("webnlg", "ter", ["TER"], "WebNLG"),
        ("e2e", "chrF++", ["chrF++"], "nw:2"),
        ("webnlg", "chrf", ["chrF++", "chrF"], "nw:"),
        ("e2e", "Distinct-1", ["distinct-1"], "Li et al"),
    ],
)
def test_names_of_metrics_and_scores(task, name, scores, tool):
    found = evaluate(["a b c d e"], [["a b c d e"]], task=task, metrics=[name])
    assert list(found) == scores
    assert all(tool in value.tool for value in found.values_by_name.values())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [(["BLUE"], "did you mean 'BLEU'"), ("BLEU", "a list of at least one name"), ([], "a list"), ([3], "got 3")],
)
def test_wrong_names(metrics, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(["a"], ["a"], task="e2e", metrics=metrics)


def test_names_are_those_of_any_iterable():
    assert list(evaluate(["a"], ["a"], task="e2e", metrics=(n for n in ("length", "empty")))) == ["length", "empty"]
    for metrics in (iter(()), {}, 3, b""):
        with pytest.raises(ConfigError, match="metrics: expected a list of at least one name"):
            evaluate(["a"], ["a"], task="e2e", metrics=metrics)


def test_a_missing_metric_is_a_named_gap(monkeypatch):
    def gone(*_):
        msg = "needs a thing"
        raise MetricUnavailable(msg)

    monkeypatch.setitem(module.METRICS, "chrf", dataclasses.replace(METRICS["chrf"], function=gone))
    monkeypatch.setitem(module.TASK_METRICS, "table", ("chrf", "lengths"))
    found = evaluate(["a"], ["a"], task="table")
    assert found.missing == {"chrF++": "needs a thing", "chrF": "needs a thing"}
    assert "chrF++" in found.table()
    assert "needs a thing" in found.table()
    with pytest.raises(MetricUnavailable, match="needs a thing"):
        evaluate(["a"], ["a"], task="table", metrics=["chrF"])


def test_tables_come_from_the_references_or_the_outputs():
    rows = [{"mr": "name[Mill]", "text": "Mill"}]
    for outputs, references in ((["Mill"], [{"mr": "name[Mill]", "ref": "x"}]), (rows, ["x"])):
        assert evaluate(outputs, references, task="e2e", metrics=["slot coverage"])["slot coverage"] == 1


def test_json_of_metrics():
    found = Metrics("e2e", 2, {"A": MetricValue(0.123456, "0.12", "t 1", "lower")}, {"B": "no package"})
    assert json.loads(json.dumps(found.to_json())) == {
        "task": "e2e",
        "num_texts": 2,
        "scores": {"A": {"value": 0.123456, "text": "0.12", "tool": "t 1", "better": "lower"}},
        "missing": {"B": "no package"},
    }
    assert found.table().splitlines() == ["A  0.12 ↓  t 1", "B     -    no package"]


# ---- command ----


def test_the_scores_of_the_example(cli, tmp_path):
    folder = shared.folder("metrics")
    files = (folder / "example-hyp.txt", folder / "example-refs.txt")
    done = cli("eval", *map(str, files), "--task", "e2e", "--metrics", "BLEU,NIST", "-o", str(tmp_path / "s.json"))
    assert done.code == 0, done.err
    lines = [line.split("\t")[:3] for line in done.out.splitlines()]
    assert lines == [["score", "value", "better"], ["BLEU", "0.7203", "↑"], ["NIST", "7.8212", "↑"]]
    written = json.loads((tmp_path / "s.json").read_text())
    assert {name: score["text"] for name, score in written["scores"].items()} == {"BLEU": "0.7203", "NIST": "7.8212"}
    printed = cli("eval", *map(str, files), "--task", "e2e", "--metrics", "BLEU,NIST", "--json")
    assert json.loads(printed.out) == written


def test_an_option_with_commas_can_be_given_several_times(cli, write):
    words = ("eval", write("o", "a\n"), write("r", "a\n"), "--task", "e2e")
    done = cli(*words, "--metrics", "length, BLEU", "--metrics", "NIST")
    assert done.code == 0, done.err
    assert [line.split("\t")[0] for line in done.out.splitlines()] == ["score", "length", "BLEU", "NIST"]


def test_several_files_of_references(cli, write):
    files = [write("o", "a b\nc\n"), write("r0", "a b\ne\n"), write("r1", "c d\n\n")]
    done = cli("eval", *map(str, files), "--task", "webnlg", "--metrics", "reference length", "--json")
    assert json.loads(done.out)["scores"]["reference length"]["value"] == 5 / 3


def test_an_output_that_is_no_json_file(cli, write):
    files = [str(write("o", "a\n")), str(write("r", "a\n"))]
    done = cli("eval", *files, "--task", "e2e", "-o", "scores.csv")
    assert done.code != 0
    assert "expected a file ending in .json" in done.err + str(done.code)
