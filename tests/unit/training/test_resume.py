"""Resume after errors, interrupts and SIGKILL gives the prefixes of an uninterrupted run to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import prefixfast
import tiny
from cut_runs import Cut, CutAt
from oracles import ROOT
from prefixfast.errors import ConfigError, DataError
from prefixfast.training import output_check
from prefixfast.training.trainer import train
from token_rows import rows

DATA = {"a": rows(0, 5), "b": rows(1, 7), "c": rows(2, 4)}
HELD_OUT = {n: rows(10 + i, 4) for i, n in enumerate(DATA)}
HOW = {
    "batch_size": 2,
    "prefix_length": 3,
    "learning_rate": 3e-2,
    "init": "random",
    "max_steps": 20,
    "prefix_dropout": 0.2,
    "warmup_steps": 3,
    "weight_decay": 0.01,
    "eval_steps": 2,
    "early_stopping_patience": 3,
    "save_steps": 1,
    "logging_steps": 1,
}
MLP = {"reparameterization": "mlp", "encoder_hidden_size": 16, "learning_rate": 5e-3}
FLAT = {"reparameterization": "none"}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2")) as loaded:
        yield loaded


def digests(run) -> dict[str, str]:
    return {n: p.digest for n, p in run.items()}


@pytest.mark.parametrize("kind", [FLAT, MLP], ids=["flat", "mlp"])
def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path, kind):
    how = {**HOW, **kind, "overrides": {"c": {"max_steps": 4}}, "eval_data": HELD_OUT}
    whole = train(model, DATA, output_dir=tmp_path / "whole", **how)
    for save_steps, cuts in ((1, (1, 9)), (3, (5,)), (7, (6,))):
        out = tmp_path / f"every-{save_steps}"
        for cut in cuts:
            with pytest.raises(Cut):
                train(
                    model,
                    DATA,
                    output_dir=out,
                    resume=True,
                    callbacks=[CutAt(cut)],
                    **{**how, "save_steps": save_steps},
                )
        run = train(model, DATA, output_dir=out, resume=True, **{**how, "save_steps": save_steps})
        assert digests(run) == digests(whole)
        assert run.metrics == whole.metrics
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in run.log] == [
            {k: v for k, v in line.items() if k != "seconds"} for line in whole.log
        ]
        assert digests({n: prefixfast.Prefix.from_pretrained(out / n) for n in DATA}) == digests(whole)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one_in_every_dtype(dtype, threads, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with prefixfast.load(tiny.make("gpt2").to(dtype)) as model:
            how = {**HOW, **FLAT, "max_steps": 8, "eval_data": HELD_OUT}
            whole = train(model, DATA, **how)
            with pytest.raises(Cut):
                train(model, DATA, output_dir=tmp_path, callbacks=[CutAt(5)], **how)
            assert digests(train(model, DATA, output_dir=tmp_path, resume=True, **how)) == digests(whole)
    finally:
        torch.set_num_threads(before)


def test_a_single_prefix_resumes(model, tmp_path):
    how = {**HOW, **FLAT, "eval_data": HELD_OUT["b"]}
    whole = train(model, DATA["b"], output_dir=tmp_path / "whole", **how)
    with pytest.raises(Cut):
        train(model, DATA["b"], output_dir=tmp_path / "cut", callbacks=[CutAt(5)], **how)
    assert train(model, DATA["b"], output_dir=tmp_path / "cut", resume=True, **how).digest == whole.digest


def test_finished_prefixes_are_not_trained_again(model, tmp_path):
    seen = []

    class Watch:
        def on_step(self, step, losses, grad_norms, active):
            seen.append((step, active.tolist()))

    store = prefixfast.PrefixStore(tmp_path / "store")
    how = {
        **HOW,
        **FLAT,
        "max_steps": 3,
        "overrides": {"b": {"max_steps": 6}},
        "store": store,
        "output_dir": tmp_path / "out",
        "eval_data": HELD_OUT,
    }
    with pytest.raises(Cut):
        train(model, DATA, callbacks=[CutAt(5)], **how)
    versions = {n: len(list(store.info(n).folder.parent.iterdir())) for n in ("a", "c")}
    assert train(model, DATA, resume=True, callbacks=[Watch()], **how)
    assert seen == [(5, [False, True, False]), (6, [False, True, False])]
    assert {n: len(list(store.info(n).folder.parent.iterdir())) for n in ("a", "c")} == versions
    seen.clear()
    again = train(model, DATA, resume=True, callbacks=[Watch()], **how)
    assert seen == []
    assert digests(again) == {n: store[n].digest for n in DATA}
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_the_probe_of_a_killed_run_is_removed(model, tmp_path, monkeypatch):
    """Killed between making the folder that shows whether names can be written, and removing it."""
    out, how = tmp_path / "out", {**HOW, **FLAT, "eval_data": HELD_OUT}
    with pytest.raises(Cut):
        train(model, DATA, output_dir=out, callbacks=[CutAt(2)], **how)
    with monkeypatch.context() as patched:
        patched.setattr(output_check.shutil, "rmtree", lambda *_, **__: None)
        output_check.check_writable(out, list(DATA))
    assert len(list(out.glob(".*.tmp"))) == 1
    train(model, DATA, output_dir=out, resume=True, **how)
    assert not list(out.rglob("*.tmp"))


def test_failures_are_kept_in_the_checkpoint(model, tmp_path):
    good = train(
        model, rows(0, 4), **{**HOW, **FLAT, "max_steps": 1, "eval_steps": None, "early_stopping_patience": None}
    )
    bad = prefixfast.Prefix({n: torch.full_like(t, 1e25) for n, t in good.kv.items()}, good.pos_start)
    how = {k: v for k, v in HOW.items() if k not in ("init", "prefix_length", "eval_steps", "early_stopping_patience")}
    with pytest.raises(Cut):
        train(
            model,
            {"good": rows(0, 4), "bad": rows(0, 4)},
            init={"good": good, "bad": bad},
            output_dir=tmp_path,
            callbacks=[CutAt(15)],
            **how,
        )
    run = train(
        model,
        {"good": rows(0, 4), "bad": rows(0, 4)},
        init={"good": good, "bad": bad},
        output_dir=tmp_path,
        resume=True,
        **how,
    )
    assert list(run) == ["good"]
    assert "not finite" in run.failed["bad"]
    assert json.loads((tmp_path / "failed.jsonl").read_text())["prefix"] == "bad"


CHANGES = {
    "rows": ({"data": {**DATA, "b": rows(5, 7)}}, "data of 'b' differs"),
    "a name more": (
        {"data": {**DATA, "d": rows(5, 7)}, "eval_data": {**HELD_OUT, "d": rows(5, 7)}},
        "data: d was nothing",
    ),
    "held-out rows": ({"eval_data": {**HELD_OUT, "a": rows(77, 2)}}, "eval_data of 'a' differs"),
    "rate": ({"learning_rate": 1e-2}, "config: learning_rate was 0.03, is 0.01"),
    "rate of one": ({"overrides": {"a": {"learning_rate": 1e-2}}}, "own config: a was nothing"),
    "length": ({"prefix_length": 4}, "prefix_config: prefix_length was 3, is 4"),
    "init": ({"init": "zero"}, "init: a was 'random', is 'zero'"),
    "seed": ({"seed": 1}, "config: seed was 0, is 1"),
}


@pytest.fixture(scope="module")
def cut_run(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut")
    with pytest.raises(Cut):
        train(model, DATA, eval_data=HELD_OUT, output_dir=out, callbacks=[CutAt(3)], **HOW, **FLAT)
    return out


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_another_run_is_refused(model, cut_run, change, message):
    before = {p: p.read_bytes() for p in cut_run.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=message):
        train(
            model,
            **{"data": DATA, "eval_data": HELD_OUT, "output_dir": cut_run, "resume": True, **HOW, **FLAT, **change},
        )
    assert {p: p.read_bytes() for p in cut_run.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_base_model_is_refused(cut_run):
    with pytest.raises(ConfigError, match="base of 'weights' differs"):
        train(tiny.make("gpt2", seed=1), DATA, eval_data=HELD_OUT, output_dir=cut_run, resume=True, **HOW, **FLAT)


def test_options_without_effect_on_results_may_change(model, tmp_path):
    how = {**HOW, **FLAT, "eval_data": HELD_OUT}
    whole = train(model, DATA, **how)
    with pytest.raises(Cut):
        train(model, DATA, output_dir=tmp_path, callbacks=[CutAt(5)], **how)
    run = train(
        model,
        DATA,
        output_dir=tmp_path,
        resume=True,
        **{**how, "logging_steps": 3, "save_steps": 50, "gradient_checkpointing": True},
    )
    assert digests(run) == digests(whole)


def test_a_halved_budget_stays_halved(model, tmp_path, monkeypatch):
    original = type(model).losses

    def limited(self, plan, ids, *rest):
        if len(ids) > 15:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, plan, ids, *rest)

    how = {**HOW, **FLAT, "eval_data": HELD_OUT, "batch_size": 4, "max_steps": 8}
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "losses", limited)
        whole = train(model, DATA, **how)
        with pytest.raises(Cut):
            train(model, DATA, output_dir=tmp_path, callbacks=[CutAt(5)], **how)
    assert digests(train(model, DATA, output_dir=tmp_path, resume=True, **how)) == digests(whole)
    assert digests(train(model, DATA, **how)) != digests(whole), "another packing rounds otherwise"


def test_a_damaged_checkpoint_is_refused(model, tmp_path):
    with pytest.raises(Cut):
        train(model, DATA, eval_data=HELD_OUT, output_dir=tmp_path, callbacks=[CutAt(3)], **HOW, **FLAT)
    tensors = tmp_path / "checkpoint" / "0" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"cannot be read.*remove"):
        train(model, DATA, eval_data=HELD_OUT, output_dir=tmp_path, resume=True, **HOW, **FLAT)


def test_resume_needs_output_dir_and_starts_without_a_checkpoint(model, tmp_path):
    with pytest.raises(ConfigError, match="expected output_dir or store"):
        train(model, DATA, resume=True, **HOW, **FLAT, eval_data=HELD_OUT)
    run = train(model, DATA, resume=True, output_dir=tmp_path / "new", eval_data=HELD_OUT, **HOW, **FLAT)
    assert len(run) == 3


def test_a_new_run_removes_the_old_checkpoint(model, tmp_path):
    with pytest.raises(Cut):
        train(model, DATA, eval_data=HELD_OUT, output_dir=tmp_path, callbacks=[CutAt(9)], **HOW, **FLAT)
    how = {**HOW, "seed": 3, "overwrite": True}
    with pytest.raises(Cut):
        train(model, DATA, eval_data=HELD_OUT, output_dir=tmp_path, callbacks=[CutAt(1)], **how, **FLAT)
    run = train(model, DATA, eval_data=HELD_OUT, output_dir=tmp_path, resume=True, **{**HOW, "seed": 3}, **FLAT)
    assert digests(run) == digests(train(model, DATA, eval_data=HELD_OUT, **{**HOW, "seed": 3}, **FLAT))


def test_a_prefix_finished_after_the_checkpoint_is_stored_once(model, tmp_path):
    class CutAfter:
        def on_log(self, line):
            if line["step"] == 3:
                raise Cut

    store = prefixfast.PrefixStore(tmp_path / "store")
    how = {
        **HOW,
        **FLAT,
        "eval_data": HELD_OUT,
        "overrides": {"a": {"max_steps": 3}},
        "save_steps": 2,
        "store": store,
        "output_dir": tmp_path / "out",
    }
    with pytest.raises(Cut):
        train(model, DATA, callbacks=[CutAfter()], **how)
    folder = store.info("a").folder
    run = train(model, DATA, resume=True, **how)
    assert (store.info("a").folder, store.info("a").digest) == (folder, run["a"].digest)
    assert set(store) == set(DATA)


# ---- interrupts ----


@pytest.fixture
def ctrl_c():
    """Install Python's own SIGINT handler, which a background process lacks."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


class InterruptAt:
    """Sends SIGINT to this process in the middle of a step."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen = steps, 0

    def on_step(self, step, losses, grad_norms, active):
        self.seen = step
        if step in self.steps:
            for _ in range(self.steps.count(step)):
                os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_writes_a_checkpoint_and_restores_the_model(ctrl_c, tmp_path):
    model = tiny.make("llama").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    how = {**HOW, **MLP, "eval_data": HELD_OUT, "save_steps": None}
    whole = train(model, DATA, **how)
    with pytest.raises(KeyboardInterrupt):
        train(model, DATA, output_dir=tmp_path, callbacks=[InterruptAt(4)], **how)
    state = json.loads((tmp_path / "checkpoint" / "0" / "state.json").read_text())["state"]
    assert state["step"] == 4
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert digests(train(model, DATA, output_dir=tmp_path, resume=True, **how)) == digests(whole)


def test_a_second_interrupt_takes_effect_at_once(ctrl_c, model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(model, DATA, output_dir=tmp_path, eval_data=HELD_OUT, callbacks=[InterruptAt(4, 4)], **HOW, **FLAT)
    assert json.loads((tmp_path / "checkpoint" / "0" / "state.json").read_text())["state"]["step"] == 3


def test_without_output_dir_an_interrupt_takes_effect_at_once(ctrl_c, model):
    watch = InterruptAt(4)
    with pytest.raises(KeyboardInterrupt):
        train(model, DATA, callbacks=[watch], eval_data=HELD_OUT, **HOW, **FLAT)
    assert watch.seen == 4


def test_a_signal_handler_of_the_application_stays(model, tmp_path):
    seen = []
    old = signal.signal(signal.SIGINT, lambda *_: seen.append("application"))
    try:
        run = train(model, DATA, output_dir=tmp_path, eval_data=HELD_OUT, callbacks=[InterruptAt(2)], **HOW, **FLAT)
    finally:
        signal.signal(signal.SIGINT, old)
    assert (seen, len(run)) == (["application"], 3)


def test_training_in_another_thread_works(model, tmp_path):
    results = []
    worker = threading.Thread(
        target=lambda: results.append(train(model, DATA, output_dir=tmp_path, eval_data=HELD_OUT, **HOW, **FLAT))
    )
    worker.start()
    worker.join()
    assert len(results[0]) == 3


# ---- SIGKILL ----


def killed(tmp_path: Path, kills: int, seed: int) -> dict:
    script = ROOT / "tests" / "kill_training.py"
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(kills), str(seed)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.long)])
def test_random_kills_change_nothing(tmp_path, kills):
    found = killed(tmp_path, kills, seed=kills)
    assert found["kills"] == kills
    assert found["equal"], found
    assert found["left"] == []
    assert len(set(found["steps"])) > kills // 4, (found, "the kills hit different moments")
