"""Submitted requests: the worker thread, futures, coroutines, cancellation, deadlines, priorities and back-pressure."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable

import pytest
import torch

import prefixfast
import tiny
from mixes import prefixes_of, requests
from prefixfast import Engine, PrefixStore
from prefixfast.attention import cpu_dense
from prefixfast.engine.worker import Worker
from prefixfast.errors import CapacityError, ConfigError, DataError, UnknownPrefixError

SMALL = {"max_num_seqs": 4, "max_model_len": 64}


@pytest.fixture(scope="module")
def base():
    return tiny.make("gpt2")


@pytest.fixture
def engine(base):
    with Engine(base, **SMALL) as engine:
        yield engine


@pytest.fixture
def store(base, tmp_path):
    """A store with twelve prefixes."""
    store = PrefixStore(tmp_path / "store")
    for i, prefix in enumerate(prefixes_of(base, 3)):
        store.put(f"user {i}", prefix)
    return store


def test_submitted_requests_give_the_same_as_a_batch(base):
    batch, chosen = requests(base, 5)
    with Engine(base, **SMALL) as engine:
        expected = [g.token_ids for g in engine.generate(batch, chosen)]
        tickets = [engine.submit(b, c) for b, c in zip(batch, chosen, strict=True)]
        assert [t.result(60).token_ids for t in tickets] == expected
        assert [g.token_ids for g in engine.generate(batch, chosen)] == expected  # now through the thread

        async def all_at_once():
            return await asyncio.gather(*(engine.agenerate(b, c) for b, c in zip(batch, chosen, strict=True)))

        assert [g.token_ids for g in asyncio.run(all_at_once())] == expected


def gated(length: int) -> tuple[Callable[..., torch.Tensor], Callable[[Callable[[], None]], None]]:
    """A logits processor that waits at a text of ``length`` tokens, and a function that acts while it waits."""
    entered, gate = threading.Event(), threading.Event()

    def wait(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == length:
            entered.set()
            assert gate.wait(60)
        return scores

    def act(work: Callable[[], None]) -> None:
        assert entered.wait(60)
        work()
        gate.set()

    return wait, act


def test_a_cancelled_request_has_its_tokens_so_far(engine):
    other = engine.submit([5, 6], max_new_tokens=40, min_new_tokens=40)
    cancel_at, reached = gated(4)
    ticket = engine.submit([5, 6], max_new_tokens=60, min_new_tokens=60, logits_processor=[cancel_at])
    reached(ticket.cancel)
    got = ticket.result(60)
    assert got.finish_reason == "cancelled"
    assert len(got.token_ids) < 60
    assert other.result(60).token_ids[: len(got.token_ids)] == got.token_ids
    ticket.cancel()  # has no effect on a request that has ended


def test_a_cancelled_beam_search_has_its_best_running_beam(base):
    with Engine(base, **SMALL) as engine:
        cancel_at, reached = gated(8)
        ticket = engine.submit([5, 6], max_new_tokens=60, min_new_tokens=60, num_beams=3, logits_processor=[cancel_at])
        reached(ticket.cancel)
        got = ticket.result(60)
        assert got.finish_reason == "cancelled"
        assert 5 <= len(got.token_ids) < 60
        assert got.score < 0
        other = engine.generate(
            [[5, 6]], max_new_tokens=len(got.token_ids), min_new_tokens=len(got.token_ids), num_beams=3
        )[0]
        assert (other.token_ids, other.score) == (got.token_ids, pytest.approx(got.score))


def test_a_cancelled_task_cancels_its_request(engine):
    entered, gate = asyncio.Event(), threading.Event()

    async def cancel_while_it_runs():
        loop = asyncio.get_running_loop()

        def wait(_, scores):
            loop.call_soon_threadsafe(entered.set)
            gate.wait(60)
            return scores

        how = {"max_new_tokens": 62, "min_new_tokens": 62}
        task = asyncio.ensure_future(engine.agenerate([5, 6], logits_processor=[wait], **how))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()

    asyncio.run(cancel_while_it_runs())
    engine.generate([[7]], max_new_tokens=2)
    assert engine.stats()["cancelled"] == 1
    assert not engine.loop.busy


def test_a_deadline_ends_waiting_and_running_requests(base, monkeypatch):
    """The clock of the loop stands still until the running request has tokens."""
    now = time.monotonic()
    with Engine(base, max_num_seqs=1, max_model_len=64) as engine:

        def late(input_ids, scores):
            if input_ids.shape[1] == 10:  # eight tokens after the prompt
                monkeypatch.setattr("prefixfast.engine.loop.time.monotonic", lambda: now + 100)
            return scores

        monkeypatch.setattr("prefixfast.engine.loop.time.monotonic", lambda: now)
        long = {"max_new_tokens": 62, "min_new_tokens": 62}
        running = engine.submit([5, 6], logits_processor=[late], timeout=50, **long)
        waiting = engine.submit([5, 6], max_new_tokens=4, timeout=50)
        later = engine.submit([5, 6], max_new_tokens=4, min_new_tokens=4)
        assert waiting.result(60).finish_reason == "deadline"
        assert waiting.result().token_ids == []
        assert running.result(60).finish_reason == "deadline"
        assert 8 <= len(running.result().token_ids) < 12
        assert later.result(60).finish_reason == "length"


def order_of_ends(engine, submits) -> list[int]:
    """Places of requests in the order in which they end. All are submitted before the first of them can run."""
    done: list[int] = []
    gate = threading.Event()
    forward = engine.model.forward
    engine.model.forward = lambda *args: (gate.wait(60), forward(*args))[1]
    try:
        first = engine.submit([3], max_new_tokens=2)
        while not engine.loop.busy:
            time.sleep(0.001)
        tickets = [engine.submit([5, 6], max_new_tokens=3, **how) for how in submits]
        for i, ticket in enumerate(tickets):
            ticket.future.add_done_callback(lambda _, i=i: done.append(i))
        gate.set()
        first.result(60)
        for ticket in tickets:
            ticket.result(60)
    finally:
        engine.model.forward = forward
    return done


def test_a_higher_priority_runs_first(base):
    with Engine(base, max_num_seqs=1, max_model_len=64) as engine:
        assert order_of_ends(engine, [{"priority": 0}, {"priority": 2}, {"priority": 1}]) == [1, 2, 0]


def test_tenants_get_equal_service(base):
    with Engine(base, max_num_seqs=1, max_model_len=64) as engine:
        assert order_of_ends(engine, [*[{"tenant": "loud"}] * 4, *[{"tenant": "quiet"}] * 2]) == [0, 4, 1, 5, 2, 3]


def test_too_many_waiting_requests_are_refused(base):
    with Engine(base, max_num_seqs=1, max_model_len=64, max_waiting=3) as engine:
        gate = threading.Event()
        forward = engine.model.forward
        engine.model.forward = lambda *args: (gate.wait(60), forward(*args))[1]
        try:
            tickets = [engine.submit([5, 6], max_new_tokens=2)]
            while not engine.loop.busy:
                time.sleep(0.001)
            tickets += (engine.submit([5, 6], max_new_tokens=2) for _ in range(2))
            with pytest.raises(CapacityError, match="3 requests are waiting already"):
                tickets += (engine.submit([5, 6], max_new_tokens=2) for _ in range(2))
        finally:
            gate.set()
            engine.model.forward = forward
        assert all(t.result(60).token_ids for t in tickets)
        assert len(engine.generate([[5, 6]] * 12, max_new_tokens=2)) == 12, "a batch waits for room in the queue"
    with Engine(base, max_num_seqs=1, max_model_len=64, max_waiting=3) as engine:
        assert len(engine.generate([[5, 6]] * 12, max_new_tokens=2)) == 12


def test_a_batch_larger_than_the_queue_runs_in_steps_that_empty_it(base):
    with Engine(base, max_num_seqs=4, max_model_len=64, max_waiting=1) as engine:
        engine.submit([5, 6], max_new_tokens=1).result(60)
        for _ in range(5):
            assert len(engine.generate([[5, 6]] * 5, max_new_tokens=1)) == 5


def test_a_generate_that_waited_uses_a_worker_that_was_started_meanwhile(base):
    class Watched:
        """Lock that tells that a thread is about to wait for it."""

        def __init__(self, lock):
            self.lock, self.entered = lock, threading.Event()

        def __enter__(self):
            self.entered.set()
            return self.lock.__enter__()

        def __exit__(self, *error):
            return self.lock.__exit__(*error)

        def locked(self):
            return self.lock.locked()

    with Engine(base, max_num_seqs=4, max_model_len=64) as engine:
        results, lock = [], engine.driver.lock
        with lock:  # as if another thread ran the loop
            engine.driver.lock = watched = Watched(lock)
            waiting = threading.Thread(target=lambda: results.append(engine.generate([[5, 6]] * 3, max_new_tokens=4)))
            waiting.start()
            assert watched.entered.wait(60)
            engine.driver.worker = Worker(engine.loop, engine.driver.to_result, None)
        tickets = [engine.submit([5, 6], max_new_tokens=4) for _ in range(20)]
        waiting.join(60)
        assert [r.token_ids for r in results[0]] == [tickets[0].result(60).token_ids] * 3
        assert all(t.result(60).token_ids == tickets[0].result().token_ids for t in tickets)


def test_an_error_in_a_step_fails_every_request_and_the_engine_goes_on(engine, monkeypatch):
    expected = engine.submit([5, 6], max_new_tokens=5).result(60).token_ids
    original = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *_: 1 / 0)
    tickets = [engine.submit([5, 6], max_new_tokens=5) for _ in range(3)]
    for ticket in tickets:
        with pytest.raises(ZeroDivisionError):
            ticket.result(60)
    monkeypatch.setattr(engine.model, "forward", original)
    assert engine.submit([5, 6], max_new_tokens=5).result(60).token_ids == expected


def test_an_engine_explains_its_operators(base):
    in_rust = ", long texts in rust" if cpu_dense.is_used(torch.float32, 8) else ""
    with Engine(base, **SMALL) as engine:
        assert engine.explain() == {
            "attn": f"torch (grouped by prefix and merged{in_rust})",
            "attn_decode": "rust (each row's keys read once, in place)",
            "decode step": "eager; CUDA graphs need a GPU",
            "linear": "prepacked for this CPU (oneDNN)",
            "weights": "not quantized",
        }
    with Engine(prefixfast.load(tiny.make("gpt2"), backend="reference"), **SMALL, prepack=False) as engine:
        assert engine.explain() == {
            "attn": "reference (the specification, slow)",
            "attn_decode": "reference (the specification, slow)",
            "decode step": "eager; CUDA graphs need a GPU",
            "linear": "torch; prepack=False",
            "weights": "not quantized",
        }
    with Engine(tiny.make("gpt2").double(), **SMALL) as engine:
        explained = engine.explain()
        assert explained["attn"] == "torch (grouped by prefix and merged)"
        assert explained["attn_decode"] == "torch (grouped by prefix and merged); rust does not support torch.float64"
        assert explained["linear"] == "torch; dtype torch.float64"


def test_close_cancels_unfinished_requests(base):
    engine = Engine(base, **SMALL)
    tickets = [engine.submit([5, 6], max_new_tokens=60, min_new_tokens=60) for _ in range(9)]
    engine.close()
    assert all(t.done() for t in tickets)
    with pytest.raises(ConfigError, match="closed"):
        engine.submit([5, 6])


def test_names_mean_prefixes_of_the_store(base, store):
    batch, _ = requests(base, 5)
    own = prefixes_of(base, 3)
    names = {p.digest: f"user {i}" for i, p in enumerate(own)}
    with Engine(base, **SMALL) as engine:
        expected = [g.token_ids for g in engine.generate(batch, [own[i % 12] for i in range(len(batch))])]
    with Engine(base, store=store, **SMALL, host_prefix_memory=1) as engine:
        rows = [{**b, "prefix": f"user {i % 12}"} for i, b in enumerate(batch)]
        got = engine.generate(rows)
        assert [g.token_ids for g in got] == expected
        assert [names[g.prefix_digest] for g in got] == [r["prefix"] for r in rows]
        assert [g.token_ids for g in engine.generate(batch, [f"user {i % 12}" for i in range(len(batch))])] == expected
        assert engine.generate([batch[0]], "user 0")[0].token_ids == expected[0]
        assert engine.stats()["reads"] >= 12
        with pytest.raises(UnknownPrefixError, match="nobody"):
            engine.generate([[5]], ["nobody"])


def test_a_prefix_that_cannot_be_read_fails_its_own_requests_only(base, store):
    with Engine(base, store=store, **SMALL) as engine:
        good = engine.generate([[5, 6]], "user 1", max_new_tokens=4)[0].token_ids
        (file,) = store.info("user 0").folder.glob("*.safetensors")
        shutil.move(file, file.with_suffix(".gone"))
        tickets = [engine.submit([5, 6], "user 0", max_new_tokens=4), engine.submit([5, 6], "user 1", max_new_tokens=4)]
        with pytest.raises(DataError, match="expected a prefix or PEFT"):
            tickets[0].result(60)
        assert tickets[1].result(60).token_ids == good
        with pytest.raises(DataError, match="expected a prefix or PEFT"):
            engine.generate([[5, 6]], "user 0", max_new_tokens=4)
        shutil.move(file.with_suffix(".gone"), file)
        assert len(engine.generate([[5, 6]], "user 0", max_new_tokens=4, min_new_tokens=4)[0].token_ids) == 4


def test_long_prompts_are_prefilled_in_chunks_beside_running_requests(base):
    g = torch.Generator().manual_seed(1)
    batch = [torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist() for n in (3, 110, 40, 99, 70, 5)]
    prefixes = [prefixes_of(base, 3)[i] for i in (0, 1, 0, 2, 5, 1)]
    how = {"max_new_tokens": 12, "num_beams": 2}
    with Engine(base, max_num_seqs=12, max_model_len=130) as engine:
        expected = [x.token_ids for x in engine.generate(batch, prefixes, **how)]
        assert engine.stats()["continued_prefills"] == 0
    with Engine(base, max_num_seqs=12, max_model_len=130, max_num_batched_tokens=64) as engine:
        assert [x.token_ids for x in engine.generate(batch, prefixes, **how)] == expected
        assert engine.stats()["continued_prefills"] >= 3
