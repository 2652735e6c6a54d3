"""Trained weights in one thread and other uses of the same base model in others: all results are those of each alone.

Gates in logits processors hold a run in its middle, so that the other use meets it there every time.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.hooks import RemovableHandle

import tiny
from prefixfast import ConfigError, Engine, Prefix, generate, load, score, train
from prefixfast.engine import weights as engine_weights
from prefixfast.model.guard import BaseGuard
from token_rows import rows

DATA = rows(0, 4)
PROMPTS = [[5, 6, 7], [8, 9]]
HOW = {"batch_size": 2, "max_steps": 3, "learning_rate": 3e-2}
PREFIX = {"prefix_length": 3, "init": "random"}
NEW = {"max_new_tokens": 4, "min_new_tokens": 4}
METHODS = ("full", "top2", "adapter", "lora")


@pytest.fixture(scope="module")
def base():
    with load(tiny.make("gpt2")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def made(base):
    """Trained weights by method, and a prefix."""
    weights = {m: train(base, DATA, method=m, seed=i, **HOW) for i, m in enumerate(METHODS)}
    return weights | {"prefix": train(base, DATA, **PREFIX, **HOW)}


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def unchanged(base):
    """The base model, which has its own tensors, flags and modules at the end."""

    def state():
        parameters = {n: (id(p), p.data_ptr(), p.requires_grad, p.grad) for n, p in base.hf.named_parameters()}
        return parameters, [(n, id(m)) for n, m in base.hf.named_modules()], base.head

    before, values = state(), {n: p.detach().clone() for n, p in base.hf.named_parameters()}
    yield base
    assert state() == before
    assert all(torch.equal(p, values[n]) for n, p in base.hf.named_parameters())
    assert not base.guard._holds


class Gate:
    """Logits processor that stops its run at the first token until the gate is opened."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, ids, logits):
        self.entered.set()
        assert self.opened.wait(60)
        return logits


def texts(found):
    return [g.token_ids for g in found]


def tokens(base, artifact=None, **how):
    return texts(generate(PROMPTS, artifact, model=base, **NEW, **how))


def logprobs(base, artifact=None):
    return [s.logprob for s in score(DATA, artifact, model=base)]


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


USES = {
    "generate": lambda base, made: tokens(base),
    "score": lambda base, made: logprobs(base),
    "generate with a prefix": lambda base, made: tokens(base, made["prefix"]),
    "generate with other weights": lambda base, made: tokens(base, made["top2"]),
    "an engine": lambda base, made: in_engine(base),
    "an engine with a thread": lambda base, made: in_engine(base, starts_thread=True),
    "train a prefix": lambda base, made: train(base, DATA, **PREFIX, **HOW).digest,
    "train weights": lambda base, made: train(base, DATA, method="lora", **HOW).digest,
    "a prefix of a text": lambda base, made: Prefix.from_text(base, [4, 5]).digest,
    "fingerprint": lambda base, made: base.fingerprint,
    "load": lambda base, made: type(load(base.hf).head),
    "make an engine": lambda base, made: captured_state(base),
}


def in_engine(base, *, starts_thread=False):
    with Engine(base) as engine:
        if starts_thread:
            return [engine.submit(p, **NEW).result(60).token_ids for p in PROMPTS]
        return texts(engine.generate(PROMPTS, **NEW)), [s.logprob for s in engine.score(DATA)]


def captured_state(base):
    """State of the base model in which an engine made its copies and graphs."""
    with Engine(base) as engine:
        return engine.loop.captured


@pytest.mark.parametrize("method", METHODS)
def test_other_threads_never_meet_the_weights_of_a_call(unchanged, made, threads, method):
    base, weights = unchanged, made[method]
    expected = {name: use(base, made) for name, use in USES.items()}
    alone = tokens(base, weights)
    assert alone != tokens(base)
    for name, use in USES.items():
        gate = Gate()
        call = threads.submit(tokens, base, weights, logits_processor=[gate])
        assert gate.entered.wait(60)
        other = threads.submit(use, base, made)
        wait_until(lambda: base.guard.is_awaited)
        gate.opened.set()
        assert call.result(60) == alone, name
        assert other.result(60) == expected[name], name


@pytest.mark.parametrize("method", METHODS)
def test_weights_wait_for_runs_of_other_threads(unchanged, made, threads, method):
    base = unchanged
    expected, alone = tokens(base, made["prefix"]), tokens(base, made[method])
    trained = train(base, DATA, method=method, **HOW).digest
    for use, right in (
        (lambda: tokens(base, made[method]), alone),
        (lambda: train(base, DATA, method=method, **HOW).digest, trained),
    ):
        gate = Gate()
        call = threads.submit(tokens, base, made["prefix"], logits_processor=[gate])
        assert gate.entered.wait(60)
        other = threads.submit(use)
        wait_until(lambda: base.guard.is_awaited)
        gate.opened.set()
        assert call.result(60) == expected
        assert other.result(60) == right


def test_prefixes_of_threads_run_at_the_same_time(unchanged, made, threads):
    """All threads are inside their runs at once, or the barrier breaks; a training ends while a run stands still."""
    base, prefix, barrier = unchanged, made["prefix"], threading.Barrier(3)
    expected = tokens(base, prefix)

    def meet(ids, logits):
        barrier.wait(60)
        return logits

    calls = [threads.submit(tokens, base, prefix, logits_processor=[meet]) for _ in range(3)]
    assert all(call.result(60) == expected for call in calls)
    gate = Gate()
    call = threads.submit(tokens, base, prefix, logits_processor=[gate])
    assert gate.entered.wait(60)
    assert train(base, DATA, **PREFIX, **HOW).digest == prefix.digest
    assert logprobs(base, prefix)
    gate.opened.set()
    assert call.result(60) == expected


def test_trainings_of_weights_take_turns(unchanged, threads):
    """The steps of two trainings and calls of a third thread alternate."""
    base = unchanged
    alone, expected = [train(base, DATA, method=m, **HOW).digest for m in ("full", "lora")], tokens(base)
    start = threading.Barrier(3)

    def together(work):
        start.wait(60)
        return work()

    trainings = [
        threads.submit(together, lambda m=m: train(base, DATA, method=m, **HOW).digest) for m in ("full", "lora")
    ]
    calls = threads.submit(together, lambda: [tokens(base) for _ in range(4)])
    assert [t.result(60) for t in trainings] == alone
    assert calls.result(60) == [expected] * 4


@pytest.mark.parametrize("method", METHODS)
def test_weights_beside_an_engine_with_a_thread_are_refused_before_any_work(unchanged, made, method):
    base, weights = unchanged, made[method]
    expected = tokens(base, weights)
    with Engine(base) as engine, Engine(base) as other:
        assert texts(other.generate(PROMPTS, weights, **NEW)) == expected
        first = engine.submit(PROMPTS[0], **NEW).result(60).token_ids
        for refused in (
            lambda: engine.generate(PROMPTS, weights, **NEW),
            lambda: engine.score(DATA, weights),
            lambda: other.generate(PROMPTS, weights, **NEW),
            lambda: tokens(base, weights),
            lambda: logprobs(base, weights),
            lambda: train(base, DATA, method=method, **HOW),
        ):
            with pytest.raises(ConfigError, match="engine with a thread"):
                refused()
        assert engine.submit(PROMPTS[0], **NEW).result(60).token_ids == first
        engine.close()
        assert texts(other.generate(PROMPTS, weights, **NEW)) == expected
    with load(tiny.make("gpt2")) as again, Engine(base) as engine:  # the advice
        engine.submit(PROMPTS[0], **NEW).result(60)
        assert tokens(again, weights) == expected


def test_calls_that_would_wait_for_themselves_are_refused(unchanged, made):
    base, weights, errors = unchanged, made["lora"], []

    def refused(work):
        def process(ids, logits):
            with pytest.raises(ConfigError) as e:
                work()
            errors.append(e.value)
            return logits

        return [process]

    expected = tokens(base), tokens(base, weights)
    assert tokens(base, logits_processor=refused(lambda: tokens(base, weights))) == expected[0]
    again = refused(lambda: tokens(base, made["full"]))
    assert tokens(base, weights, logits_processor=again) == expected[1]
    with Engine(base) as other:
        submits = refused(lambda: other.submit(PROMPTS[0], **NEW))
        assert tokens(base, weights, logits_processor=submits) == expected[1]
        scores = refused(lambda: other.score(DATA, weights))
        assert tokens(base, logits_processor=scores) == expected[0]
    assert len(errors) == 4 * NEW["max_new_tokens"] * len(PROMPTS)


@pytest.mark.parametrize("method", METHODS)
def test_calls_inside_a_run_with_weights_do_not_run_with_them(unchanged, made, threads, method):
    """The thread of the engine, which another thread starts meanwhile, waits for the end of the run."""
    base, weights, refused, gate = unchanged, made[method], [], Gate()
    expected, plain = tokens(base, weights), tokens(base)
    with Engine(base) as inline, Engine(base) as threaded:
        calls = {
            "generate": lambda: tokens(base),
            "score": lambda: logprobs(base),
            "train": lambda: train(base, DATA, method="lora", **HOW),
            "generate inline": lambda: inline.generate(PROMPTS, **NEW),
            "score inline": lambda: inline.score(DATA),
            "generate in a thread": lambda: threaded.generate(PROMPTS, **NEW),
            "score in a thread": lambda: threaded.score(DATA),
            "close": threaded.close,
            "result": lambda: ticket.result(60),
            "stream": lambda: next(iter(threaded.stream(PROMPTS[0], **NEW))),
        }

        def process(ids, logits):
            gate(ids, logits)
            for name, call in calls.items():
                with pytest.raises(ConfigError):
                    call()
                refused.append(name)
            return logits

        run = threads.submit(tokens, base, weights, logits_processor=[process])
        assert gate.entered.wait(60)
        ticket = threaded.submit(PROMPTS[0], **NEW)
        wait_until(lambda: base.guard.is_awaited)
        gate.opened.set()
        assert run.result(60) == expected
        assert {*refused} == {*calls}
        assert ticket.result(60).token_ids == plain[0]
        assert texts(threaded.generate(PROMPTS, **NEW)) == texts(inline.generate(PROMPTS, **NEW)) == plain


def test_engines_that_run_inside_each_other_do_not_wait_for_each_other(unchanged, made, threads):
    """A processor uses an engine for which another thread waits with weights, until the processor's run has ended."""
    base, weights, inner, gate = unchanged, made["adapter"], [], Gate()
    expected, scores = tokens(base, weights), logprobs(base)
    with Engine(base) as shared:

        def process(ids, logits):
            gate(ids, logits)
            inner.append([s.logprob for s in shared.score(DATA)])
            return logits

        outer = threads.submit(tokens, base, logits_processor=[process])
        assert gate.entered.wait(60)
        waiting = threads.submit(lambda: texts(shared.generate(PROMPTS, weights, **NEW)))
        wait_until(lambda: base.guard.is_awaited)
        gate.opened.set()
        assert outer.result(60) == tokens(base)
        assert waiting.result(60) == expected
    assert inner == [scores] * len(inner)
    assert inner


def test_an_interrupted_run_does_not_keep_weights_out(unchanged, made, threads):
    base, weights = unchanged, made["full"]
    expected = tokens(base, weights)

    def interrupt(ids, logits):
        raise KeyboardInterrupt

    with Engine(base) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, logits_processor=[interrupt], **NEW)
        assert threads.submit(tokens, base, weights).result(60) == expected
        assert texts(engine.generate(PROMPTS, weights, **NEW)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_base_whose_restoring_was_interrupted_is_refused(made, method, monkeypatch):
    """Weights that Ctrl-C leaves in the base act in no later call."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    weights = made[method]
    place = (RemovableHandle, "remove") if method == "adapter" else (torch.nn.Parameter, "requires_grad_")
    with load(tiny.make("gpt2")) as own:
        alone = tokens(own)
        with engine_weights.applied_weights(own, weights):
            pass
        assert tokens(own) == alone
        with monkeypatch.context() as patched:
            acting = engine_weights.applied_weights(own, weights)
            acting.__enter__()
            patched.setattr(*place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                acting.__exit__(None, None, None)
        for call in (lambda: tokens(own), lambda: tokens(own, weights), lambda: score(DATA, model=own)):
            with pytest.raises(ConfigError, match="load it again"):
                call()


def test_the_number_of_tokens_does_not_change_the_use_of_the_guard(unchanged, monkeypatch):
    entered, hold = [], BaseGuard._own
    monkeypatch.setattr(BaseGuard, "_own", lambda self: (entered.append(self), hold(self))[1])
    counts = []
    for count in (2, 30):
        entered.clear()
        generate(PROMPTS, model=unchanged, max_new_tokens=count, min_new_tokens=count)
        counts.append(len(entered))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_follow_the_place_of_the_weights(unchanged, made, method, monkeypatch):
    """Each call uploads the weights anew, as it does for a GPU, and a captured step reads the places of its capture."""
    base, weights, uploaded = unchanged, made[method], []

    def copied(tensors):
        uploaded.append({name: t.clone() for name, t in tensors.items()})
        return uploaded[-1]

    expected = tokens(base, weights), tokens(base)
    monkeypatch.setattr(engine_weights, "shared_tensors", copied)
    with Engine(base, max_num_seqs=4) as engine:
        engine.loop.run_ahead = True  # as on a GPU
        captured = [engine.loop.captured]
        for artifact, right in zip(
            (weights, weights, None, weights), (*expected[:1] * 2, *expected[::-1]), strict=True
        ):
            assert texts(engine.generate(PROMPTS, artifact, **NEW)) == right
            captured.append(engine.loop.captured)
    assert captured[0] == captured[3]
    assert len(set(captured)) == 4
