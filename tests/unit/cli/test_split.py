"""Official files named by their split, in `train`, `generate` and `score`, and in Python's `train`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from prefixfast import ConfigError, DataError, Prefix, evaluate, load, train
from prefixfast.cli.result_formats import one_line
from prefixfast.data import read_task
from prefixfast.data.builtin_tasks import TASKS, find_task
from prefixfast.data.row_reader import RowReader, corpus_name, corpus_of, each_reference

# Columns and order of devset.csv and testset_w_refs.csv in tuetschek/e2e-dataset.
E2E = 'mr,ref\n"name[A], food[Thai]",A is Thai.\n"name[B]",B.\n"name[A], food[Thai]",Thai at A.\n'
WEBNLG = {"entries": [{"1": {"modifiedtripleset": [{"subject": "s", "property": "p", "object": "o"}]}}]}
DART = [{"tripleset": [["s", "P", "o"]], "annotations": [{"source": "x", "text": "S."}]}]
FAST = ("--max-steps", "2", "--batch-size", "2", "--prefix-length", "3", "--dtype", "float32")
OPTIONS: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "prefix_length": 3, "task": "e2e"}
FEW = ("--max-new-tokens", 3, "--num-beams", 1, "--max-num-seqs", 4)


@pytest.fixture(scope="module")
def e2e(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("e2e") / "e2e.csv"
    path.write_text(E2E)
    return path


@pytest.fixture(scope="module")
def prefix(folder, e2e) -> Path:
    where = e2e.parent / "p"
    with load(folder, dtype="float32") as base:
        train(base, e2e, split="train", eval_data=e2e, output_dir=where, **OPTIONS)
    return where


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_reads_the_split_and_its_held_out_rows_as_dev(cli, folder, e2e, prefix, tmp_path):
    given = ("--task", "e2e", "--split", "train", "--eval-data", e2e)
    done = cli("train", folder, e2e, "-o", tmp_path / "p", *given, *FAST)
    assert done.code == 0, done.err
    made, again = Prefix.from_pretrained(tmp_path / "p"), Prefix.from_pretrained(prefix)
    assert [made.training["metrics"][n] for n in ("rows", "examples", "eval_rows")] == [3, 3, 2]
    with load(folder, dtype="float32") as base:
        rows, held_out = read_task("e2e", e2e, "train"), read_task("e2e", e2e, "dev")
        by_rows = train(base, rows, eval_data=held_out, **OPTIONS)
        in_memory = train(base, str(e2e), split="train", eval_data=held_out, **OPTIONS)
        several = train(base, {"a": e2e, "b": e2e}, split="dev", eval_data={"a": e2e, "b": held_out}, **OPTIONS)
    assert by_rows.digest == in_memory.digest == made.digest == again.digest
    assert [several.metrics[n]["eval_rows"] for n in "ab"] == [2, 2]


@pytest.mark.parametrize("held_out", [True, False])
def test_the_next_command_of_a_split_runs(cli, folder, tmp_path, monkeypatch, held_out):
    """A folder of a corpus, whose held-out split is read if there is one."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "my e2e"
    corpus.mkdir()
    (corpus / "trainset.csv").write_text(E2E)
    (corpus / "devset.csv").write_text('mr,ref\n"name[C]",C.\n"name[C]",See.\n')
    given = ("--task", "e2e", "--split", "train", *(("--eval-data", "my e2e") if held_out else ()))
    done = cli("train", folder, "my e2e", "-o", "p", *given, *FAST, "--json")
    assert done.code == 0, done.err
    words = shlex.split(json.loads(done.out)["next"])
    assert cli(*words[1:], *FEW).code == 0
    assert Path("texts.txt").read_text().count("\n") == (1 if held_out else 3)
    refused = cli("generate", "my e2e", "-o", "o.jsonl", "--prefix", "p")
    assert (refused.code, "--split" in refused.err) == (1, True)


def test_generate_makes_one_text_for_each_input(cli, e2e, prefix, tmp_path):
    out, plain = tmp_path / "o.jsonl", tmp_path / "o.txt"
    for path in (out, plain):
        done = cli("generate", e2e, "-o", path, "--split", "test", "--prefix", prefix, *FEW)
        assert done.code == 0, done.err
    made = lines(out)
    assert [(r["mr"], r["refs"]) for r in made] == [
        ("name[A], food[Thai]", ["A is Thai.", "Thai at A."]),
        ("name[B]", ["B."]),
    ]
    assert plain.read_text() == "".join(one_line(r["text"]) + "\n" for r in made), "for official scorers"


def test_texts_stand_in_the_order_of_the_inputs(cli, prefix, tmp_path):
    """Rows of one reference and of several are mixed; `eval` matches texts and references by their place."""
    given = [("A", {"ref": "a"}), ("B", {"refs": ["b", "c"]}), ("C", {}), ("A", {"ref": "d"}), ("D", {"ref": "e"})]
    rows = [{"mr": f"name[{name}]", "id": f"{i}", **texts} for i, (name, texts) in enumerate(given)]
    path, out = tmp_path / "rows.jsonl", tmp_path / "o.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("generate", path, "-o", out, "--split", "dev", "--prefix", prefix, *FEW)
    assert done.code == 0, done.err
    made = lines(out)
    assert [(r["mr"][5], r["id"], r.get("refs")) for r in made] == [
        ("A", "0", ["a", "d"]),
        ("B", "1", ["b", "c"]),
        ("C", "2", None),
        ("D", "4", ["e"]),
    ]
    with_texts = [r for r in made if "refs" in r]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["mr"] != "name[C]"))
    scored = evaluate([{**r, "text": r["refs"][-1]} for r in with_texts], path, task="e2e", metrics=["BLEU"])
    assert scored.num_texts == 3


def test_score_scores_each_reference(cli, e2e, prefix, tmp_path):
    scored, whole = tmp_path / "s.jsonl", tmp_path / "w.jsonl"
    done = cli("score", e2e, "-o", scored, "--split", "test", "--prefix", prefix)
    assert done.code == 0, done.err
    assert [r["ref"] for r in lines(scored)] == ["A is Thai.", "Thai at A.", "B."]
    assert "refs" not in lines(scored)[0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in read_task("e2e", e2e, "test")))
    assert cli("score", rows, "-o", whole, "--prefix", prefix).code == 0
    first, second, third = [r["logprob"] for r in lines(scored)]
    assert [r["logprob"] for r in lines(whole)] == pytest.approx([first + second, third], rel=1e-5)


def test_trained_weights_read_a_split_as_a_prefix_does(cli, folder, e2e, tmp_path):
    weights, texts, scores = tmp_path / "w", tmp_path / "o.txt", tmp_path / "o.jsonl"
    method = ("--method", "full", "--max-steps", 1, "--dtype", "float32")
    for arguments in (
        ("train", folder, e2e, "-o", weights, "--task", "e2e", "--split", "train", *method),
        ("generate", e2e, "-o", texts, "--split", "test", "--prefix", weights, *FEW),
        ("score", e2e, "-o", scores, "--split", "test", "--prefix", weights),
    ):
        done = cli(*arguments)
        assert done.code == 0, done.err
    assert (texts.read_text().count("\n"), len(lines(scores))) == (2, 3)


def test_the_file_shows_the_corpus_to_the_base_alone(cli, folder, e2e, tmp_path):
    done = cli("generate", e2e, "-o", tmp_path / "o.jsonl", "--split", "dev", "--model", folder, *FEW)
    assert done.code == 0, done.err
    assert len(lines(tmp_path / "o.jsonl")) == 2
    for name, text, corpus in (
        ("a.json", json.dumps(WEBNLG), "webnlg"),
        ("a.json", json.dumps(DART), "dart"),
        ("b.csv", E2E, "e2e"),
    ):
        (tmp_path / name).write_text(text)
        assert corpus_of(TASKS["prompt"], tmp_path / name) == corpus
        assert corpus_of(TASKS["webnlg"], tmp_path / name) == "webnlg", "the task of the prefix comes first"
    with pytest.raises(ConfigError, match="split: expected a task with official files"):
        corpus_of(TASKS["prompt"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "train"), "split: expected a task with official files beside it"),
        (("--split", "train", "--task", "prompt"), "got the task 'prompt'"),
        (("--split", "train", "--prompt", "{mr} ->", "--target", "ref"), "got the task 'columns'"),
        (("--split", "eval", "--task", "e2e"), "split: expected one of train, dev, test, got 'eval'"),
        (("--split", "train", "--task", "e2e", "--encoding", "cp1252"), "official files are UTF-8"),
    ],
)
def test_a_split_without_official_files_is_refused(cli, folder, e2e, tmp_path, arguments, message):
    done = cli("train", folder, e2e, "-o", tmp_path / "p", *arguments, *FAST)
    assert (done.code, message in done.err) == (1, True), done.err
    assert not (tmp_path / "p").exists()
    checked = cli("data", "check", e2e, *arguments)
    assert (checked.code, message in checked.err) == (1, True), checked.err


def test_the_advice_for_an_official_file_without_a_split_names_options_that_exist(cli, folder, tmp_path):
    """The advised options make an error of the file's own out of the advice; `generate` has no --task."""
    files = {"a.json": json.dumps(WEBNLG), "d.json": json.dumps(DART), "x.source": "a", "s.story": "a", "w.xml": "<a/>"}
    for name, text in files.items():
        path = tmp_path / name
        path.write_text(text)
        checked = cli("data", "check", path)
        assert ("a public corpus; " in checked.out, "split" in checked.out) == (True, True), checked.out
        made = cli("generate", path, "-o", tmp_path / "o.jsonl", "--model", folder)
        assert name == "d.json" or "a public corpus; " in made.err, made.err
        if "--task" in checked.out:
            task = checked.out.partition("--task ")[2].partition(")")[0].split()[0]
            assert "public corpus; " not in cli("data", "check", path, "--task", task, "--split", "test").out
    row = {"prompt": "a", "completion": "b", "tripleset": []}
    assert find_task(None, row).name == "prompt"


def test_requests_that_are_no_official_file_are_refused(cli, e2e, prefix, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    for source, split, message in (
        ("-", "test", "expected the path of an official file"),
        (e2e, "eval", "split: expected one of train, dev, test"),
        (tmp_path / "none.csv", "test", "none.csv"),
        (e2e.parent / "*.csv", "test", "a pattern"),
    ):
        for command in ("generate", "score"):
            done = cli(command, source, "-o", tmp_path / "o.jsonl", "--split", split, "--prefix", prefix)
            assert (done.code, message in done.err) == (1, True), done.err
    with pytest.raises(ConfigError, match="split: expected the path of an official file"):
        RowReader(split="train", task="e2e").read([{"mr": "name[A]", "ref": "A."}])


def test_a_file_of_another_split_is_refused(tmp_path, cli):
    rows = [{"fname": f"dev_{i}", "dialogue": f"d{i}", "summary": "s"} for i in range(500)]
    path = tmp_path / "dialogsum.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="the train split of dialogsum, got 500 texts, which is its dev split"):
        read_task("dialogsum", path, "train")
    checked = cli("data", "check", path, "--task", "dialogsum", "--split", "train")
    assert (checked.code, "which is its dev split" in checked.out) == (1, True)
    path.write_text("".join(json.dumps({**row, "fname": None}) + "\n" for row in rows))
    checked = cli("data", "check", path, "--task", "dialogsum", "--split", "train")
    assert (checked.code, "as many as its dev split; is it" in checked.out) == (0, True), checked.out


def test_corpora_of_tasks_and_references():
    own = dataclasses.replace(TASKS["dart"], prompt="{src} ->")
    assert corpus_name(own) == corpus_name(own.spec()) == corpus_name("dart") == "dart"
    rows = [{"document": "d", "refs": ["a", "b"]}, {"document": "e", "summary": "c"}, {"triples": [], "refs": ["f"]}]
    assert each_reference(rows) == [
        {"document": "d", "summary": "a"},
        {"document": "d", "summary": "b"},
        {"document": "e", "summary": "c"},
        {"triples": [], "ref": "f"},
    ]
