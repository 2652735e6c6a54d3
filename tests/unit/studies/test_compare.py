"""Comparison of methods: rows, runs, results, tables and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import prefixfast
from oracles import ROOT
from prefixfast.data import TASKS
from prefixfast.errors import ConfigError, DataError
from prefixfast.metrics.evaluate import evaluate
from prefixfast.metrics.registry import better_side
from prefixfast.store.workspace import lock, unlock
from prefixfast.studies.compare import run as run_module
from prefixfast.studies.compare.estimate import estimate_run
from prefixfast.studies.compare.plot import plot
from prefixfast.studies.compare.rows import read_study_rows
from prefixfast.studies.compare.runner import FAILED, RESULTS, RUNS, Runner, make_runs, read_results
from prefixfast.studies.compare.scores import score_texts
from prefixfast.studies.compare.study import Study, StudyRun
from prefixfast.studies.compare.summary import LOSS, Spread, summarize
from prefixfast.studies.compare.table import cost_rows, in_units, markdown, number, quality_rows
from prefixfast.studies.compare.variants import NAMES, Variant, read_variants

TRAIN = {"max_steps": 3, "batch_size": 4, "dtype": "float32", "token_budget": 512}
METHODS = (
    Variant("prefix", {"prefix_length": 3}),
    Variant("prefix-mlp", {"prefix_length": 3, "encoder_hidden_size": 8}),
)
TABLES = [f"name[{name}], area[{area}]" for name in ("Mill", "Inn", "Bar", "Pub", "Den") for area in ("city", "river")]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    """File of E2E rows, two for each of ten tables."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"mr": mr, "ref": f"{word} {mr[5:8]}."} for mr in TABLES for word in ("The", "At")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def study(folder, rows_file) -> Study:
    decoding = {"max_new_tokens": 5, "num_beams": 1}
    return Study(str(folder), str(rows_file), train=TRAIN, decoding=decoding, metrics=["BLEU", "NIST"])


@pytest.fixture
def runs(study) -> list[StudyRun]:
    return make_runs(study, read_study_rows(study), METHODS, range(2))


@pytest.fixture
def in_process(monkeypatch):
    """Carry out runs in this process, and return the labels of those that ran. A run of seed 13 fails."""
    ran: list[str] = []

    def wait_for(self, run: StudyRun, folder: Path, held: tuple[int, ...]) -> int:
        ran.append(run.label)
        folder.mkdir(parents=True)
        failed = {"error": "the gradient was not finite"}
        result = failed if run.seed == 13 else run_module.train_and_evaluate(run, folder, progress=False)
        (folder / run_module.RESULT).write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(Runner, "_wait_for", wait_for)
    return ran


# ---- rows ----


def test_no_held_out_input_is_trained_on_and_references_are_grouped(study):
    rows = read_study_rows(study)
    held_out = {r["mr"] for r in rows.held_out}
    assert len(held_out) == len(rows.requests) == 2  # a fifth of ten
    assert held_out.isdisjoint(r["mr"] for r in rows.train)
    assert len(rows.train) + len(rows.held_out) == 2 * len(TABLES)
    for request, references in zip(rows.requests, rows.references, strict=True):
        assert references == [f"{word} {request['mr'][5:8]}." for word in ("The", "At")]


def test_the_split_does_not_depend_on_the_order_of_the_rows(study, tmp_path):
    lines = Path(study.data).read_text().splitlines()
    random.Random(1).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(lines))
    shuffled = read_study_rows(Study(study.model, str(tmp_path / "shuffled.jsonl")))
    assert {r["mr"] for r in shuffled.requests} == {r["mr"] for r in read_study_rows(study).requests}


def test_held_out_rows_of_a_file_are_all_evaluated(study, rows_file):
    rows = read_study_rows(Study(study.model, str(rows_file), eval_data=str(rows_file)))
    assert (len(rows.train), len(rows.held_out), len(rows.requests)) == (20, 20, 10)


def test_rows_and_inputs_are_limited(study, rows_file):
    rows = read_study_rows(Study(study.model, str(rows_file), eval_data=str(rows_file), max_rows=7, max_inputs=3))
    assert (len(rows.train), len(rows.requests), len(rows.held_out)) == (7, 3, 6)
    assert {r["mr"] for r in rows.held_out} == {r["mr"] for r in rows.requests}


def test_equal_references_count_as_often_as_in_evaluate(study, tmp_path):
    """Official scripts count a reference once for each row, so that the effective length of BLEU depends on it."""
    refs = ["The Mill is by the river.", "A mill.", "A mill."]
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps({"mr": mr, "ref": ref}) + "\n" for mr in TABLES[:2] for ref in refs))
    held = Study(study.model, study.data, eval_data=str(path), metrics=["BLEU", "NIST", "length"])
    rows, texts = read_study_rows(held), ["The Mill is here.", "A mill by the river."]
    assert rows.references == [refs, refs]
    expected = evaluate(texts, path, task="e2e", metrics=held.metrics)
    assert dict(score_texts(held, rows, texts)) == dict(expected)


def test_a_conversation_is_asked_without_its_answer(study, tmp_path):
    def talk(question: str, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    talks = [talk(q, a) for q in "abcdefgh" for a in ("x", "y")]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    rows = read_study_rows(Study(study.model, str(tmp_path / "chat.jsonl")))
    assert len(rows.requests) == 1
    assert [m["role"] for m in rows.requests[0]["messages"]] == ["user"]
    assert rows.references == [["x", "y"]]


@pytest.mark.parametrize("row", [{"text": "a b"}, {"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}])
def test_rows_without_an_input_of_their_own_are_refused(study, tmp_path, row):
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    with pytest.raises(DataError, match="an input and a target"):
        read_study_rows(Study(study.model, str(tmp_path / "rows.jsonl")))


def test_rows_that_hold_out_nothing_are_refused(study, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    with pytest.raises(DataError, match="--eval-data"):
        read_study_rows(Study(study.model, str(tmp_path / "rows.jsonl")))


# ---- methods and identity ----


def test_methods_and_their_options():
    found = read_variants("prefix, adapter-0.1", ["adapter-0.1.learning-rate=1e-3", "prefix.init=zero"])
    assert [v.options for v in found] == [
        {"method": "prefix", "init": "zero"},
        {"method": "adapter", "adapter_size": 0.001, "learning_rate": 1e-3},
    ]
    assert found[0].label == "prefix (init=zero)"


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ("prefix,lor", [], "did you mean 'lora'"),
        ("prefix,prefix", [], "different"),
        ("prefix", ["lora.lora_rank=4"], "one of the compared methods prefix, got 'lora'"),
        ("prefix", ["prefix_length=4"], "METHOD.OPTION=VALUE"),
        ("prefix", ["prefix.prefix_length="], "METHOD.OPTION=VALUE"),
        ("prefix", ["prefix.seed=3"], "--seeds"),
        ("prefix", ["prefix.init=folder"], "text, random, zero"),
        ("prefix", ["prefix.prefix_length=4", "prefix.prefix-length=5"], "twice"),
    ],
)
def test_wrong_methods_are_refused(names, settings, message):
    with pytest.raises(ConfigError, match=message):
        read_variants(names, settings)


def test_what_changes_the_result_changes_the_identity(study, runs, rows_file, tmp_path):
    def first(**changes) -> StudyRun:
        changed = dataclasses.replace(study, **changes)
        return make_runs(changed, read_study_rows(changed), METHODS, range(1))[0]

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(study.model).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert first(model=str(copy)).identity == runs[0].identity  # the same files in another place
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("}", " }"))
    others = [
        first(model=str(copy)),
        first(train={**TRAIN, "max_steps": 4}),
        first(decoding={"max_new_tokens": 6}),
        first(max_rows=7),
        *runs[1:],
    ]
    assert len({p.identity for p in (runs[0], *others)}) == len(others) + 1
    assert first(train={**TRAIN, "save_steps": 2, "token_budget": 64}).identity == runs[0].identity
    assert StudyRun.from_json(json.loads(json.dumps(runs[0].to_json()))).identity == runs[0].identity


# ---- runs ----


def test_a_run_is_what_train_and_generate_give(study, runs, tmp_path):
    rows, run = read_study_rows(study), runs[1]
    result = run_module.train_and_evaluate(run, tmp_path, progress=False)
    with prefixfast.load(study.model, dtype="float32") as base:
        alone = prefixfast.train(
            base,
            rows.train,
            task="e2e",
            eval_data=rows.held_out,
            init="random",
            reparameterization="mlp",
            encoder_hidden_size=8,
            prefix_length=3,
            seed=0,
            max_steps=3,
            batch_size=4,
        )
        texts = [g.text for g in prefixfast.generate(rows.requests, alone, model=base, **study.decoding)]
    assert result["metrics"] == alone.training["metrics"]
    lines = [json.loads(line) for line in (tmp_path / run_module.OUTPUTS).read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    assert [line["references"] for line in lines] == rows.references
    scores = result["quality"]["scores"]
    found = evaluate(texts, rows.references, task="e2e", metrics=["BLEU", "NIST"])
    assert {name: score["value"] for name, score in scores.items()} == dict(found)
    costs = result["costs"]
    assert (costs["num_trained"], costs["num_stored"]) == (alone.num_trained, alone.num_stored)
    assert costs["memory_bytes"] == alone.nbytes
    alone.save_pretrained(tmp_path / "alone")
    assert costs["disk_bytes"] == pytest.approx(sum(f.stat().st_size for f in (tmp_path / "alone").iterdir()), abs=99)
    assert 0 < costs["seconds_per_step"] <= costs["train_seconds"]
    assert costs["train_peak_bytes"] <= costs["generate_peak_bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_run(study, name, tmp_path):
    rows = read_study_rows(study)
    small = {"prefix-mlp": {"encoder_hidden_size": 8}, "icl": {"num_examples": 1}}
    run = make_runs(study, rows, [Variant(name, small.get(name, {}))], (0,))[0]
    result = run_module.train_and_evaluate(run, tmp_path, progress=False)
    found = summarize([result], run.shared).methods[0]
    assert found.quality[LOSS].mean > 0
    assert found.costs["disk bytes"].mean >= found.costs["memory bytes"].mean > 0
    assert ("s/step" in found.costs) == (name not in ("prompt", "icl"))  # which take no steps
    assert found.costs["trained"].mean > 0 or name in ("prompt", "icl")


def test_a_run_of_other_rows_is_refused(study, runs, tmp_path, rows_file):
    run = dataclasses.replace(runs[0], rows="0" * 64)
    with pytest.raises(DataError, match="rows have changed"):
        run_module.train_and_evaluate(run, tmp_path)


def test_a_rerun_skips_finished_runs_and_a_failed_one_stops_no_other(study, in_process, tmp_path):
    runs = make_runs(study, read_study_rows(study), METHODS[:1], (13, 0))
    lines: list[str] = []
    failed = Runner(tmp_path, lines.append).run(runs)
    assert failed == {runs[0].label: "the gradient was not finite"}
    assert json.loads((tmp_path / FAILED).read_text()) == {"run": runs[0].label, "error": failed[runs[0].label]}
    assert [r["seed"] for r in read_results(tmp_path)] == [0]
    before = (tmp_path / RESULTS).read_bytes()
    assert Runner(tmp_path, lines.append).run(runs[1:]) == {}
    assert in_process == [p.label for p in runs]  # the second run has run none
    assert (tmp_path / RESULTS).read_bytes() == before
    assert not (tmp_path / FAILED).exists()


def test_a_run_waits_for_another_one_in_the_same_folder(study, in_process, tmp_path):
    runs = make_runs(study, read_study_rows(study), METHODS[:1], (0,))
    held = lock(tmp_path)
    told = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(Runner(tmp_path, lambda text: told.set()).run, runs)
        assert told.wait(60)
        assert in_process == []
        unlock(held)
        assert run.result(120) == {}
    assert in_process == [runs[0].label]


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / RESULTS).write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match=r"results.jsonl:1: expected a result"):
        read_results(tmp_path)
    with pytest.raises(ConfigError, match="got the file"):
        read_results(tmp_path / RESULTS)


# ---- results ----


def line(label: str, seed: int, loss: float, bleu: float, *, size: int = 1000, shared: str = "s") -> dict:
    scores = {"BLEU": {"value": bleu, "text": f"{bleu:.2f}", "tool": "t"}}
    costs = dict.fromkeys(("num_trained", "num_stored", "train_peak_bytes", "disk_bytes", "memory_bytes"), size)
    return {
        "label": label,
        "seed": seed,
        "shared": shared,
        "identity": f"{label}{seed}{shared}",
        "metrics": {"eval_loss": loss},
        "quality": {"scores": scores, "missing": {"METEOR": "no Java"}},
        "costs": costs | {"base_bytes": 500, "seconds_per_step": None, "generate_seconds_per_text": 0.5},
        "counts": {"train_rows": 8, "held_out_rows": 2, "inputs": 1},
        "environment": {"cpu": "C", "gpu": None, "threads": 1},
        "dtype": "float32",
        "device": "cpu",
        "task": "e2e",
        "study": {"model": "m"},
    }


@pytest.fixture
def summary():
    prefix = [line("prefix", i, loss, bleu) for i, (loss, bleu) in enumerate([(2.0, 10.0), (2.1, 11.0), (2.3, 13.0)])]
    full = [line("full", i, loss, 12.0 + i, size=50_000) for i, loss in enumerate([1.9, 1.8, 1.7])]
    return summarize([*prefix, *full, line("lora", 0, 1.0, 90.0), line("other", 0, 0.1, 99.0, shared="t")], "s")


def test_mean_and_spread_over_seeds(summary):
    assert [m.label for m in summary.methods] == ["prefix", "full", "lora"]
    found = summary.methods[0].quality[LOSS]
    assert found.to_json() == {
        "mean": pytest.approx(6.4 / 3),
        "sd": pytest.approx(statistics.stdev([2.0, 2.1, 2.3])),
        "min": 2.0,
        "max": 2.3,
        "values": [2.0, 2.1, 2.3],
    }
    assert summary.methods[2].quality[LOSS].to_json() == {"mean": 1.0, "values": [1.0]}  # one seed has no spread
    assert "s/step" not in summary.methods[0].costs  # which no run has measured


def test_differences_are_clear_if_every_seed_shows_them_and_there_are_three(summary):
    assert summary.clear_differences(LOSS) == [("full", "prefix")]  # lower is better; lora has one seed
    assert summary.clear_differences("BLEU") == []  # 13 of prefix is more than 12 of full
    text = markdown(summary, 16e9)
    assert f"* {LOSS}: full better than prefix." in text
    assert "* BLEU: none." in text


@pytest.mark.parametrize("is_stored", [True, False], ids=["with sides", "of an earlier version"])
def test_clear_differences_go_to_the_better_side(is_stored):
    """Each score of the one method is lower than the other's."""
    names = ["BLEU", "TER", "wrong slots", "wrong slots seen", "omissions unseen", "chrF++ seen", "empty", "length"]
    lines = []
    for label, value in (("low", 1.0), ("high", 2.0)):
        for seed in range(3):
            own = line(label, seed, value, value)
            score = {"value": value + seed / 10, "text": "", "tool": "t"}
            own["quality"]["scores"] = {n: score | ({"better": better_side(n)} if is_stored else {}) for n in names}
            lines.append(own)
    summary = summarize(lines, "s")
    found = {name: summary.clear_differences(name) for name in (LOSS, *names)}
    better = {name: pairs[0][0] for name, pairs in found.items() if pairs}
    lower = dict.fromkeys((LOSS, "TER", "wrong slots", "wrong slots seen", "omissions unseen", "empty"), "low")
    assert better == lower | {"BLEU": "high", "chrF++ seen": "high"}  # a length has no better side


def test_users_that_fit_beside_the_base(summary):
    assert [m.users(100_500) for m in summary.methods] == [100, 2, 100]
    assert summary.methods[1].users(400) == 0  # less than the base


def test_tables(summary):
    quality = quality_rows(summary, [LOSS, "BLEU"])
    assert quality[1] == {"method": "full", "seeds": "3", LOSS: "1.800 ± 0.1", "BLEU": "13.00 ± 1"}
    assert quality[2] == {"method": "lora", "seeds": "1", LOSS: "1.000", "BLEU": "90.00"}
    costs = cost_rows(summary, 100_500)[0]
    assert (costs["trained"], costs["disk size"], costs["s/step"]) == ("1 k", "1 kB", "-")
    assert costs["users in 100 kB"] == "100"
    text = markdown(summary, 16e9)
    assert "| prefix | 3 | 2.133 ± 0.15 (2.000 to 2.300) | 11.33 ± 1.5 (10.00 to 13.00) |" in text
    assert "METEOR: no Java" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "0.0001234"), (0.5, "0.5000"), (12.0, "12.00"), (999.96, "1000"), (12345.6, "12,346")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (2.5e9, "2.5 GB")])
def test_sizes(value, text):
    assert in_units(value) == text


def test_one_value_has_no_deviation():
    assert Spread((1.0,)).deviation is None


def test_the_plot_is_an_image(summary, tmp_path):
    plot(summary, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


# ---- command ----


@pytest.fixture
def words(folder, rows_file, tmp_path) -> list:
    """A short comparison on the command line."""
    words = ["compare", rows_file, "--model", folder, "-o", tmp_path / "out", "--dtype", "float32", "--max-steps", "2"]
    return [*words, "--metrics", "BLEU", "--max-new-tokens", "4", "--num-beams", "1", "--methods", "prefix"]


def test_the_command_has_a_run_in_a_process_of_its_own(cli, words, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = cli(*words, "--seeds", "1")
    assert done.code == 0, done.err
    assert "one seed: no spread" in done.out
    results = (tmp_path / "out" / RESULTS).read_bytes()
    found = json.loads(results)
    assert found["environment"]["versions"]["prefixfast"] == prefixfast.__version__
    assert (found["study"]["model"], found["study"]["data"]) == ("tiny-gpt2", "rows.jsonl")
    again = cli(*words, "--seeds", "1")
    assert again.code == 0, again.err
    assert "finished before" in again.err
    assert (tmp_path / "out" / RESULTS).read_bytes() == results
    assert (tmp_path / "out" / "table.md").read_text().startswith("# Comparison")
    assert (tmp_path / "out" / "compare.png").exists()


def test_the_command_exits_with_3_if_a_run_failed(cli, words, in_process):
    done = cli(*words, "--seed", "13", "--seeds", "2", "--json")
    assert done.code == 3, done.err
    found = json.loads(done.out)
    assert found["failed"] == {"prefix, seed 13": "the gradient was not finite"}
    assert [m["seeds"] for m in found["methods"]] == [[14]]
    assert in_process == ["prefix, seed 13", "prefix, seed 14"]


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_continues_from_its_checkpoint(folder, rows_file, tmp_path, end):
    words = ["compare", rows_file, "--model", folder, "--methods", "prefix", "--seeds", "1", "--dtype", "float32"]
    words += ["--max-steps", "150", "--batch-size", "4", "--save-steps", "5", "--max-new-tokens", "4"]
    words += ["--metrics", "BLEU,NIST", "--quiet"]
    command = [sys.executable, "-m", "prefixfast", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-o", tmp_path / "whole"], env=env, check=True)
    with subprocess.Popen([*command, "-o", tmp_path / "cut"], env=env) as process:
        logs = tmp_path / "cut" / RUNS
        while sum(len(p.read_bytes().splitlines()) for p in logs.glob("*/model/log.jsonl")) < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(end)
        assert process.wait() in (130, -end)
    assert not (tmp_path / "cut" / RESULTS).exists()
    done = subprocess.run([*command[:-1], "-o", tmp_path / "cut"], env=env, check=True, capture_output=True, text=True)
    assert done.returncode == 0
    whole, cut = (read_results(tmp_path / name)[0] for name in ("whole", "cut"))
    assert cut["metrics"] == whole["metrics"]
    assert cut["quality"] == whole["quality"]
    assert TASKS["e2e"].name == cut["task"]


def test_the_estimate_has_the_steps_and_the_rates_of_the_run(runs):
    found = [estimate_run(run) for run in runs[:2]]
    assert [e["steps"] for e in found] == [3, 3]
    assert found[0]["learning_rate"] == pytest.approx(0.15)
    assert found[1]["learning_rate"] == pytest.approx(0.15 / 60)
    assert all(e[f"{what}_seconds"] > 0 for e in found for what in ("train", "evaluate", "generate"))


def test_the_estimate_reads_the_recipe(study, tmp_path):
    (tmp_path / "small.yaml").write_text("batch_size: 2\nmax_steps: 2\n")
    training = {"dtype": "float32", "token_budget": 512, "recipe": str(tmp_path / "small.yaml")}
    study = dataclasses.replace(study, train=training)
    found = estimate_run(make_runs(study, read_study_rows(study), METHODS[:1], (0,))[0])
    assert found["steps"] == 2
    # Four examples of the two held-out tables, twice in batches of two, with half the time of a step each.
    assert found["evaluate_seconds"] == pytest.approx(2 * found["seconds_per_step"])
