"""Runs of a comparison: methods, identity, results, the runner and the estimate."""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import prefixfast
from prefixfast.errors import ConfigError, DataError
from prefixfast.metrics.evaluate import evaluate
from prefixfast.store.workspace import lock, unlock
from prefixfast.studies.compare import run as run_module
from prefixfast.studies.compare.estimate import estimate_run
from prefixfast.studies.compare.rows import read_study_rows
from prefixfast.studies.compare.runner import FAILED, RESULTS, Runner, make_runs, read_results
from prefixfast.studies.compare.study import StudyRun
from prefixfast.studies.compare.summary import LOSS, summarize
from prefixfast.studies.compare.variants import NAMES, Variant, read_variants
from unit.studies.conftest import METHODS, TRAIN


def test_methods_and_their_options():
    found = read_variants("prefix, adapter-0.1", ["adapter-0.1.learning-rate=1e-3", "prefix.init=zero"])
    assert [v.options for v in found] == [
        {"method": "prefix", "init": "zero"},
        {"method": "adapter", "adapter_size": 0.001, "learning_rate": 1e-3},
    ]
    assert found[0].label == "prefix (init=zero)"
    assert read_variants("prefix-self", [])[0].options == {"method": "prefix", "sites": "self"}


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
    # Linux counts pages in batches for each core: two readings of a peak can differ by some hundred KiB.
    assert 0 < costs["train_peak_bytes"] <= costs["generate_peak_bytes"] + 2**20


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("prefix-enc", "prefix-self", "prefix-cross")])
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
