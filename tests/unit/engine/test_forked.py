"""A child process after ``fork``: the parent's engine is refused with an error, and a new engine works."""

import asyncio
import threading

import pytest
import torch

import forked
from prefixfast import Engine, HFCache, generate, train, unload
from prefixfast.errors import ConfigError

HOW = {"max_num_seqs": 4, "max_model_len": 64}
NEW = {"max_new_tokens": 6, "min_new_tokens": 6}
CALLS = {
    "generate": lambda engine, _: engine.generate(["ab"], **NEW),
    "score": lambda engine, _: engine.score(["ab"], targets=["c"]),
    "submit": lambda engine, _: engine.submit("ab", **NEW),
    "stream": lambda engine, _: engine.stream("ab", **NEW),
    "agenerate": lambda engine, _: asyncio.run(engine.agenerate("ab", **NEW)),
    "evict": lambda engine, _: engine.evict("0" * 64),
    "resident": lambda engine, _: engine.resident(),
    "result": lambda _, ticket: ticket.result(),
    "await": lambda _, ticket: asyncio.run(awaited(ticket)),
    "cancel": lambda _, ticket: ticket.cancel(),
}


async def awaited(ticket):
    return await ticket


def in_child(work) -> None:
    """Run ``work`` in a forked process, which a hang would end with a failure."""

    def guarded() -> None:
        import faulthandler

        faulthandler.dump_traceback_later(30, exit=True)
        work()

    assert forked.end(forked.start(guarded)) == 0


@pytest.fixture
def gate():
    """Event for which the requests of `running` wait."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture(params=["inline", "thread"])
def running(base, request, gate):
    """An engine, and the ticket of a running request if the engine has a thread."""
    with Engine(base, **HOW) as engine:
        engine.generate(["ab"], **NEW)
        ticket = None
        if request.param == "thread":
            entered = threading.Event()

            def wait(_, scores):
                entered.set()
                gate.wait(60)
                return scores

            ticket = engine.submit("ab", logits_processor=[wait], **NEW)
            assert entered.wait(60)  # the fork must not come inside torch
        yield engine, ticket
        gate.set()


@pytest.mark.parametrize("call", CALLS)
def test_an_engine_of_the_parent_is_refused(running, call):
    engine, ticket = running
    if ticket is None and call in ("result", "await", "cancel"):
        pytest.skip("an engine without a thread has no tickets")

    def work():
        with pytest.raises(ConfigError, match="'spawn'"):
            CALLS[call](engine, ticket)

    in_child(work)


def test_a_child_can_leave_the_engines_context_and_make_a_new_one(running, base, make_prefix):
    engine, _ = running
    prefix = make_prefix()

    def work():
        with engine:
            pass
        with Engine(base, **HOW) as own:
            text = own.generate(["ab"], prefix, **NEW)[0].text
            assert own.submit("ab", prefix, **NEW).result(20).text == text

    in_child(work)


def test_a_result_of_the_parent_can_be_read_in_a_child(base):
    with Engine(base, **HOW) as engine:
        ticket = engine.submit("ab", **NEW)
        text = ticket.result(60).text
        in_child(lambda: ticket.result().text == text or 1 / 0)


def test_a_cache_of_the_parent_is_refused(base, make_prefix):
    ids = torch.tensor([[5, 6]])
    with HFCache(base, make_prefix()) as cache:
        base.hf.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)

        def work():
            with pytest.raises(ConfigError, match="'spawn'"):
                cache.loop.prefix_cache.loader.load(0, make_prefix(), cache.loop.prefix_cache.runs[0], 0)

        in_child(work)


def test_a_child_computes_with_the_bases_of_its_parent(base, folder, make_prefix):
    """OpenMP's threads do not survive a fork. A child of a process that has used them would wait for them for ever."""
    prefix, before = make_prefix(), torch.get_num_threads()
    torch.set_num_threads(2)
    unload()
    rows = [{"prompt": "ab", "completion": "cd"}] * 4
    try:
        expected = generate(["ab" * 20] * 8, prefix, model=folder, dtype="float32", progress=False, **NEW)
        big = torch.randn(300, 300)
        torch.nn.functional.gelu(big @ big)

        def work():
            assert torch.get_num_threads() == 1
            got = generate(["ab" * 20] * 8, prefix, model=folder, dtype="float32", progress=False, **NEW)
            assert [g.token_ids for g in got] == [g.token_ids for g in expected]
            assert train(base, rows, max_steps=2, progress=False).length > 0
            with pytest.raises(ConfigError, match="num_threads"):
                Engine(base, num_threads=2, **HOW)

        in_child(work)
    finally:
        torch.set_num_threads(before)
        unload()


def test_locks_that_another_thread_held_are_free_in_a_child(folder):
    from prefixfast.model import shared_base

    with shared_base._CACHE_LOCK:
        in_child(unload)
