"""Runs without an output folder: the store holds log, failures and checkpoints, and resumed runs go on from there."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

import prefixfast
import tiny
from cut_runs import Cut, CutAt
from prefixfast import PrefixStore
from prefixfast.errors import ConfigError, PrefixFastError
from prefixfast.store.runs import RUNS, RunFolder, run_folders
from prefixfast.training import defaults
from prefixfast.training.trainer import train
from token_rows import rows

DATA = {"a": rows(0, 5), "b": rows(1, 7), "c": rows(2, 4)}
HOW = {
    "batch_size": 2,
    "prefix_length": 3,
    "learning_rate": 3e-2,
    "init": "random",
    "reparameterization": "none",
    "max_steps": 10,
    "prefix_dropout": 0.2,
    "save_steps": 2,
    "logging_steps": 1,
    "progress": False,
}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(model):
    return train(model, DATA, **HOW, overrides={"a": {"max_steps": 5}})


class Watch:
    """Steps of each prefix by name."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def on_train_begin(self, names, steps):
        self.names = names

    def on_step(self, step, losses, grad_norms, active):
        for name, now in zip(self.names, active.tolist(), strict=True):
            if now:
                self.steps.setdefault(name, []).append(step)


def cut(model, store, step, data=DATA, **how):
    with pytest.raises(Cut):
        train(model, data, store=store, callbacks=[CutAt(step)], **HOW, **how)


def digests(run) -> dict[str, str]:
    return {n: p.digest for n, p in run.items()}


def files(store) -> set[str]:
    return {p.name for run in run_folders(store.path) for p in run.rglob("*") if not p.is_dir()}


def test_a_run_leaves_its_log_and_failures_in_the_store(model, tmp_path):
    run = train(model, {**DATA, "bad": [{"input_ids": []}]}, store=tmp_path, **HOW)
    store = PrefixStore(tmp_path)
    assert sorted(store) == sorted(run) == sorted(DATA)
    (folder,) = run_folders(tmp_path)
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == run.log
    assert json.loads((folder / "failed.jsonl").read_text())["prefix"] == "bad"
    assert files(store) == {"run.json", "log.jsonl", "failed.jsonl"}
    assert store.verify().ok
    assert len(store) == len(list(store.scan())) == 3


@pytest.mark.parametrize("step", [1, 6, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 5, 9))])
def test_a_resumed_run_equals_an_uninterrupted_one(model, whole, tmp_path, step):
    how = {"overrides": {"a": {"max_steps": 5}}}
    cut(model, tmp_path, step, **how)
    watch = Watch()
    run = train(model, DATA, store=tmp_path, resume=True, callbacks=[watch], **HOW, **how)
    assert digests(run) == digests(whole) == digests(PrefixStore(tmp_path))
    assert run.metrics == whole.metrics
    own = [{k: v for k, v in line.items() if k != "seconds"} for line in run.log]
    assert own == [{k: v for k, v in line.items() if k != "seconds"} for line in whole.log]
    assert watch.steps["b"][0] == max(1, (step - 1) // 2 * 2 + 1)
    assert {len(PrefixStore(tmp_path).versions(n)) for n in DATA} == {1}
    assert "state.json" not in files(PrefixStore(tmp_path))


def test_a_second_cut_is_resumed_too(model, whole, tmp_path):
    how = {"overrides": {"a": {"max_steps": 5}}}
    for step in (3, 7):
        cut(model, tmp_path, step, resume=True, **how)
    assert digests(train(model, DATA, store=tmp_path, resume=True, **HOW, **how)) == digests(whole)


def test_only_new_and_changed_rows_are_trained(model, tmp_path):
    first = train(model, DATA, store=tmp_path, **HOW)
    watch = Watch()
    data = {**DATA, "b": rows(8, 3), "d": rows(9, 4)}
    run = train(model, data, store=tmp_path, resume=True, callbacks=[watch], **HOW)
    assert set(watch.steps) == {"b", "d"}
    assert (list(run), run.unchanged) == (["a", "b", "c", "d"], ("a", "c"))
    assert run["a"].digest == first["a"].digest
    assert run.metrics["a"] == first.metrics["a"]
    store = PrefixStore(tmp_path)
    assert {n: len(store.versions(n)) for n in data} == {"a": 1, "b": 2, "c": 1, "d": 1}
    assert digests(train(model, data, store=tmp_path, resume=True, **HOW)) == digests(store)
    again = train(model, {"b": DATA["b"]}, store=tmp_path, resume=True, **HOW)
    assert again.unchanged == ()  # the newest version is of other rows


def started(caplog) -> str:
    """Line that the last run has logged before its first step."""
    lines = [r.getMessage() for r in caplog.records if r.name == "prefixfast.training.loop" and r.levelname == "INFO"]
    return next(line for line in reversed(lines) if line.startswith("training "))


def test_the_start_line_counts_what_is_trained(model, tmp_path, caplog):
    caplog.set_level("INFO")
    data = {"a": DATA["a"], "b": DATA["b"], "equal": [dict(row) for row in DATA["a"]]}
    how = HOW | {"overflow": "skip", "max_length": 30}
    long = [{"input_ids": [5] * 31, "labels": [-100] + [5] * 30}]
    train(model, data, store=tmp_path / "store", **how)
    assert "training 3 prefixes" in started(caplog)
    assert f"{len(DATA['a']) + len(DATA['b'])} examples" in started(caplog)
    data |= {"b": rows(8, 3) + long, "d": rows(9, 4)}
    train(model, data, store=tmp_path / "store", resume=True, **how)
    assert "training 2 prefixes" in started(caplog)
    assert "7 examples" in started(caplog)
    assert "1 skipped" in started(caplog)
    # A group that continues in an output folder has all of its prefixes, of which one ended at step 5.
    folder = {"output_dir": tmp_path / "out", "overrides": {"a": {"max_steps": 5}}}
    with pytest.raises(Cut):
        train(model, DATA, callbacks=[CutAt(7)], **folder, **HOW)
    train(model, DATA, resume=True, **folder, **HOW)
    assert "training 2 prefixes" in started(caplog)
    assert f"{len(DATA['b']) + len(DATA['c'])} examples" in started(caplog)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-3}, {"prefix_length": 4}, {"seed": 1}, {"init": "zero"}, {"max_steps": 3}]
)
def test_other_options_are_trained_again(model, tmp_path, change):
    data = {"a": DATA["a"]}
    train(model, data, store=tmp_path, **HOW)
    watch = Watch()
    run = train(model, data, store=tmp_path, resume=True, callbacks=[watch], **HOW | change)
    assert (list(watch.steps), run.unchanged) == (["a"], ())


@pytest.mark.parametrize(("name", "value"), [("FEWEST_STEPS", 12), ("LARGEST", 0.02)])
def test_other_defaults_of_a_later_version_are_trained_again(model, tmp_path, monkeypatch, name, value):
    how = {n: v for n, v in HOW.items() if n not in ("max_steps", "learning_rate")}
    monkeypatch.setattr(defaults, "FEWEST_STEPS", 10)
    monkeypatch.setattr(defaults, "PASSES", 1)
    data = {"a": DATA["a"]}
    first = train(model, data, store=tmp_path, **how)
    assert train(model, data, store=tmp_path, resume=True, **how).unchanged == ("a",)
    monkeypatch.setattr(defaults, name, value)
    later = train(model, data, store=tmp_path, resume=True, **how)
    assert later.unchanged == ()
    assert later["a"].digest != first["a"].digest


def test_options_of_one_prefix_count_for_it_alone(model, tmp_path):
    train(model, DATA, store=tmp_path, **HOW)
    watch = Watch()
    how = {"overrides": {"b": {"max_steps": 3}}, "save_steps": None, "logging_steps": 7}
    run = train(model, DATA, store=tmp_path, resume=True, callbacks=[watch], **HOW | how)
    assert (set(watch.steps), run.unchanged) == ({"b"}, ("a", "c"))


def test_another_prefix_under_the_name_is_replaced(model, whole, tmp_path):
    train(model, DATA, store=tmp_path, **HOW)
    PrefixStore(tmp_path).put("b", whole["c"])
    watch = Watch()
    train(model, DATA, store=tmp_path, resume=True, callbacks=[watch], **HOW)
    assert set(watch.steps) == {"b"}


def test_a_cut_run_goes_on_beside_new_and_changed_rows(model, tmp_path):
    cut(model, tmp_path, 7)
    watch = Watch()
    data = {"a": DATA["a"], "b": rows(8, 3), "c": DATA["c"], "d": rows(9, 4)}
    run = train(model, data, store=tmp_path, resume=True, callbacks=[watch], **HOW)
    assert {n: s[0] for n, s in watch.steps.items()} == {"a": 7, "c": 7, "b": 1, "d": 1}
    alone = train(model, {n: data[n] for n in data}, **HOW)
    for name in data:
        torch.testing.assert_close(dict(run[name].kv), dict(alone[name].kv), rtol=1e-3, atol=1e-4)
    assert files(PrefixStore(tmp_path)) == {"run.json", "log.jsonl"}


def test_two_cut_runs_of_one_store_are_resumed_in_one(model, tmp_path):
    cut(model, tmp_path, 5, data={"a": DATA["a"]})
    cut(model, tmp_path, 7, data={"b": DATA["b"]})
    watch = Watch()
    run = train(model, DATA, store=tmp_path, resume=True, callbacks=[watch], **HOW)
    assert {n: s[0] for n, s in watch.steps.items()} == {"a": 5, "b": 7, "c": 1}
    assert sorted(run) == sorted(DATA)
    assert {line.get("group", 0) for line in run.log if "step" in line} == {0, 1, 2}


def test_a_run_of_a_living_process_is_left_alone(model, tmp_path):
    cut(model, tmp_path, 7)
    (folder,) = run_folders(tmp_path)
    held = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        watch = Watch()
        train(model, DATA, store=tmp_path, resume=True, callbacks=[watch], **HOW)
        assert {s[0] for s in watch.steps.values()} == {1}
        assert (folder / "checkpoint" / "0" / "state.json").exists()
    finally:
        os.close(held)


def test_a_run_without_resume_starts_again_and_ends_the_earlier_one(model, tmp_path):
    cut(model, tmp_path, 7)
    cut(model, tmp_path, 5, data={"a": DATA["a"], "e": rows(4, 4)})
    watch = Watch()
    train(model, DATA, store=tmp_path, callbacks=[watch], **HOW)
    assert {s[0] for s in watch.steps.values()} == {1}
    states = [json.loads(p.read_text())["state"]["names"] for p in tmp_path.glob(f"{RUNS}/*/checkpoint/*/state.json")]
    assert states == [["e"]]
    watch = Watch()
    train(model, {"e": rows(4, 4)}, store=tmp_path, resume=True, callbacks=[watch], **HOW)
    assert watch.steps["e"][0] == 5


def test_a_single_prefix_resumes(model, tmp_path):
    whole = train(model, DATA["b"], **HOW)
    cut(model, tmp_path, 7, data=DATA["b"])
    watch = Watch()
    assert train(model, DATA["b"], store=tmp_path, resume=True, callbacks=[watch], **HOW).digest == whole.digest
    assert watch.steps["prefix"][0] == 7
    assert train(model, DATA["b"], store=tmp_path, resume=True, callbacks=[CutAt(1)], **HOW).digest == whole.digest


def test_a_sweep_resumes(model, tmp_path):
    how = {"sweep": {"max_length": [30, 40], "prefix_length": [2, 3]}}
    whole = train(model, DATA["b"], **HOW, **how)
    with pytest.raises(Cut):
        train(model, DATA["b"], store=tmp_path, callbacks=[CutSecond()], **HOW, **how)
    run = train(model, DATA["b"], store=tmp_path, resume=True, **HOW, **how)
    assert digests(run) == digests(whole)
    assert len(run.unchanged) == 2


class CutSecond(CutAt):
    """Ends a run in its second group."""

    def __init__(self) -> None:
        super().__init__(7)
        self.groups = 0

    def on_train_begin(self, names, steps):
        self.groups += 1

    def on_step(self, step, losses, grad_norms, active):
        if self.groups == 2:
            super().on_step(step, losses, grad_norms, active)


def test_deletion_removes_a_user_from_checkpoints_and_logs(model, tmp_path):
    how = {"overrides": {"a": {"max_steps": 5}}, "eval_data": rows(9, 3), "eval_steps": 2}
    cut(model, tmp_path, 7, data={**DATA, "mallory": [{"input_ids": []}]}, **how)
    store = PrefixStore(tmp_path)
    digest = store["a"].digest
    for name in ("a", "mallory", "b"):
        receipt = store.delete(name)
        assert receipt.running == ()
        assert receipt.checkpoints == (name != "mallory")
        assert len(receipt.digests) == (name == "a")
        assert receipt.files > 0
        assert receipt.bytes > 0
    text = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if not p.is_dir())
    assert store.verify(absent=digest).ok
    assert b'"a"' not in text
    assert b'"b"' not in text
    assert b"mallory" not in text
    watch = Watch()
    run = train(model, DATA, store=tmp_path, resume=True, callbacks=[watch], **HOW, **how)
    assert {n: s[0] for n, s in watch.steps.items()} == {"a": 1, "b": 1, "c": 7}
    alone = train(model, {"c": DATA["c"]}, **{**HOW, "eval_data": rows(9, 3), "eval_steps": 2})
    torch.testing.assert_close(dict(run["c"].kv), dict(alone["c"].kv), rtol=1e-3, atol=1e-4)


def test_deletion_of_the_last_name_removes_the_run(model, tmp_path):
    cut(model, tmp_path, 3, data={"a": DATA["a"]})
    assert PrefixStore(tmp_path).delete("a").checkpoints == 1
    assert run_folders(tmp_path) == []
    with pytest.raises(prefixfast.UnknownPrefixError):
        PrefixStore(tmp_path).delete("a")


def test_deletion_tells_of_a_run_that_goes_on(model, tmp_path):
    class Delete:
        def on_prefix_end(self, name, prefix, metrics):
            if name == "a":
                self.receipt = store.delete("a")

    store, callback = PrefixStore(tmp_path), Delete()
    train(model, DATA, store=store, callbacks=[callback], **HOW)
    assert len(callback.receipt.running) == 1
    assert store.delete("b").running == ()


def test_damaged_run_folders_do_no_harm(model, whole, tmp_path):
    how = {"overrides": {"a": {"max_steps": 5}}}
    for _ in range(3):
        cut(model, tmp_path, 7, **how)
    first, second, third = run_folders(tmp_path)
    (first / "checkpoint" / "0" / "state.json").write_text("{}")
    (second / "run.json").unlink()
    shutil.rmtree(third / "checkpoint" / "0")
    (tmp_path / RUNS / "empty").mkdir()
    (tmp_path / RUNS / "file").write_text("")
    run = train(model, DATA, store=tmp_path, resume=True, **HOW, **how)
    assert digests(run) == digests(whole)
    assert PrefixStore(tmp_path).delete("b").digests == (whole["b"].digest,)


def test_old_logs_are_removed(tmp_path, model, monkeypatch):
    monkeypatch.setattr("prefixfast.store.runs.KEPT", 3)
    cut(model, tmp_path, 3, data={"e": rows(4, 4)})
    for _ in range(5):
        train(model, {"a": DATA["a"]}, store=tmp_path, **HOW | {"max_steps": 1})
    assert len(run_folders(tmp_path)) == 3 + 1


def test_what_the_options_need(model, tmp_path):
    with pytest.raises(ConfigError, match="overwrite: expected output_dir"):
        train(model, DATA, store=tmp_path, overwrite=True, **HOW)
    with pytest.raises(ConfigError, match="opened read-only"):
        train(model, DATA, store=PrefixStore(tmp_path, read_only=True), **HOW)


@pytest.mark.parametrize(
    ("data", "how", "error"),
    [
        ([{"name": "a", "text": "b"}], {"prompt": "{nam} ->", "target": "text"}, "did you mean 'name'"),
        ([{"prompt": "a"}], {}, "completion"),
        ([{"prompt": "a", "completion": "b"}], {"max_steps": 0}, "max_steps"),
        ([{"prompt": "a", "completion": "b"}], {"overwrite": True}, "overwrite"),
        ([{"prompt": "a", "completion": "b"}], {"model": "no-such-folder/of/a/base"}, "no-such-folder"),
    ],
)
def test_a_refused_run_makes_no_store(model, tmp_path, data, how, error):
    with pytest.raises(PrefixFastError, match=error):
        train(how.pop("model", model), data, store=tmp_path / "store", progress=False, **how)
    assert not (tmp_path / "store").exists()


def test_a_name_of_a_folder_that_exists_is_no_name_of_a_run(tmp_path):
    made = {RunFolder(tmp_path, ["a"]).path for _ in range(5)}
    assert len(made) == len(run_folders(tmp_path)) == 5
