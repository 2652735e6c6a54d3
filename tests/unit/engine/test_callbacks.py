"""Code of the caller that the engine runs: calls of the same engine, exceptions that are no Exception, two readers."""

import asyncio
import signal
import threading

import pytest

from prefixfast import Engine
from prefixfast.errors import ConfigError, RequestError

HOW = {"max_num_seqs": 4, "max_model_len": 64}
NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


class Hook:
    """Logits processor that calls a function at the second token of its request."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 2:
            self.function()
        return scores


CALLS = {
    "generate": lambda engine, _: engine.generate(["cd"], max_new_tokens=1),
    "score": lambda engine, _: engine.score(["cd"], targets=["e"]),
    "submit": lambda engine, _: engine.submit("cd", max_new_tokens=1),
    "stream": lambda engine, _: engine.stream("cd", max_new_tokens=1),
    "agenerate": lambda engine, _: asyncio.run(engine.agenerate("cd", max_new_tokens=1)),
    "astream": lambda engine, _: engine.astream("cd", max_new_tokens=1),
    "pin": lambda engine, prefix: engine.pin(prefix),
    "unpin": lambda engine, prefix: engine.unpin(prefix),
    "evict": lambda engine, prefix: engine.evict(prefix),
    "resident": lambda engine, _: engine.resident(),
    "close": lambda engine, _: engine.close(),
}
WAITS = {
    "result": lambda ticket, _: ticket.result(),
    "future.result": lambda ticket, _: ticket.future.result(),
    "future.exception": lambda ticket, _: ticket.future.exception(),
    "await": lambda ticket, _: asyncio.run(awaited(ticket)),
    "for": lambda _, stream: next(iter(stream)),
    "async for": lambda _, stream: asyncio.run(first_piece(stream)),
    "generation": lambda _, stream: stream.generation,
}


async def awaited(ticket):
    return await ticket


async def first_piece(stream):
    async for piece in stream:
        return piece
    return None


@pytest.fixture(params=["inline", "thread"])
def engine(base, request):
    """An engine whose loop runs in the caller's thread, or in its own."""
    with Engine(base, **HOW) as engine:
        if request.param == "thread":
            engine.submit("x", max_new_tokens=1).result(60)
        yield engine


@pytest.mark.parametrize("call", CALLS)
def test_a_logits_processor_cannot_call_its_own_engine(engine, make_prefix, call):
    prefix = make_prefix()
    expected = engine.generate(["ab"], prefix, **NEW)[0].token_ids
    hook = Hook(lambda: CALLS[call](engine, prefix))
    (got,) = engine.generate(["ab"], prefix, logits_processor=[hook], on_error="return", **NEW)
    assert got.error.startswith("ConfigError: ")
    assert "inside a step of its own engine" in got.error
    assert engine.generate(["ab"], prefix, **NEW)[0].token_ids == expected


def test_a_logits_processor_can_cancel_and_read_counters(base):
    with Engine(base, **HOW) as engine:
        other = engine.submit("cd", max_new_tokens=40, min_new_tokens=40)
        seen = []
        hook = Hook(lambda: (engine.cancel(other), seen.append(engine.stats()["steps"]), engine.explain()))
        assert engine.submit("ab", logits_processor=[hook], **NEW).result(60).finish_reason == "length"
        assert other.result(60).finish_reason in ("cancelled", "length")
        assert seen[0] > 0


def test_another_engine_of_the_same_base_can_run_in_a_logits_processor(base):
    with Engine(base, **HOW) as engine, Engine(base, **HOW) as other:
        expected = engine.generate(["ab"], **NEW)[0].token_ids
        texts = []
        hook = Hook(lambda: texts.append(other.generate(["ab"], **NEW)[0].token_ids))
        assert engine.generate(["ab"], logits_processor=[hook], **NEW)[0].token_ids == expected
        assert texts == [expected]


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("place", ["processor", "callback"])
def test_code_in_the_engines_thread_cannot_wait_for_a_request(base, wait, place):
    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], **NEW)[0].token_ids
        seen, called = [], threading.Event()
        gate = threading.Event()
        late = {"max_new_tokens": 60, "min_new_tokens": 60}

        def function(*_):
            gate.wait(60)
            try:
                WAITS[wait](*others)
            except ConfigError as e:
                seen.append(str(e))
            finally:
                called.set()

        how = {"logits_processor": [Hook(function)]} if place == "processor" else {}
        ticket = engine.submit("ab", **NEW, **how)
        if place == "callback":
            ticket.future.add_done_callback(function)
        others = engine.submit("cd", **late), engine.stream("cd", **late)
        gate.set()
        assert called.wait(60)
        assert len(seen) == 1
        assert "cannot wait for a request" in seen[0]
        assert ticket.result(60).token_ids == expected
        assert others[0].result(60).finish_reason == "length"
        assert others[1].generation.finish_reason in ("length", "cancelled")


def test_a_callback_can_submit_pin_score_and_evict(base, make_prefix):
    with Engine(base, **HOW) as engine:
        prefix, found, ended = make_prefix(), [], threading.Event()

        def callback(_):
            engine.pin(prefix)
            found.append(engine.score(["ab"], targets=["c"])[0].logprob)
            found.append(engine.evict(prefix))
            found.append(engine.submit("ab", max_new_tokens=1))
            ended.set()

        # The gate lets the request end after the callback is added, so that the callback runs in the engine's thread.
        gate = threading.Event()
        ticket = engine.submit("ab", logits_processor=[Hook(lambda: gate.wait(60))], **NEW)
        ticket.future.add_done_callback(callback)
        gate.set()
        assert ended.wait(60)
        assert found[0] < 0
        assert found[1] is True
        assert found[2].result(60).finish_reason


def test_a_signal_handler_inside_generate_gets_an_error(base):
    with Engine(base, **HOW) as engine:
        expected, seen = engine.generate(["ab"], **NEW)[0].token_ids, []

        def handler(*_):
            for call in (lambda: engine.generate(["cd"]), lambda: engine.submit("cd"), engine.close):
                with pytest.raises(ConfigError, match="signal handler"):
                    call()
            seen.append(1)

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            hook = Hook(lambda: signal.raise_signal(signal.SIGUSR1))
            assert engine.generate(["ab"], logits_processor=[hook], **NEW)[0].token_ids == expected
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert seen == [1]


# ---- exceptions that are no Exception ----


ERRORS = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(), asyncio.CancelledError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_any_exception_of_a_processor_ends_its_own_request(base, error):
    def fail():
        raise error

    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], **NEW)[0].token_ids
        bad = engine.submit("cd", logits_processor=[Hook(fail)], **NEW)
        good = engine.submit("ab", **NEW)
        with pytest.raises(RequestError, match=type(error).__name__):
            bad.result(60)
        assert bad.future.exception().__cause__ is error
        assert good.result(60).token_ids == expected

        async def both():
            return await asyncio.gather(
                engine.agenerate("cd", logits_processor=[Hook(fail)], **NEW),
                engine.agenerate("ab", **NEW),
                return_exceptions=True,
            )

        failed, fine = asyncio.run(both())
        assert isinstance(failed, RequestError)
        assert fine.token_ids == expected
        got = engine.generate(["cd", "ab"], logits_processor=[Hook(fail)], on_error="return", **NEW)
        assert sum(g.error is None for g in got) == 1


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_any_exception_of_a_processor_inside_generate(base, error):
    def fail():
        raise error

    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], **NEW)[0].token_ids
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RequestError
        with pytest.raises(kind):
            engine.generate(["cd"], logits_processor=[Hook(fail)], **NEW)
        assert engine.generate(["ab"], **NEW)[0].token_ids == expected


def test_a_processor_that_fails_at_the_last_token_fails_its_request(engine):
    def fail():
        raise ValueError("boom")

    for run_ahead in (False, True):
        engine.loop.run_ahead = run_ahead
        (got,) = engine.generate(["ab"], logits_processor=[Hook(fail)], on_error="return", max_new_tokens=2)
        assert got.error == "ValueError: boom"


@pytest.mark.parametrize("error", [*ERRORS, ValueError("boom")], ids=lambda e: type(e).__name__)
def test_any_exception_of_a_callback_stays_in_it(base, error):
    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], **NEW)[0].token_ids
        gate, called = threading.Event(), []

        def fail(_):
            called.append(1)
            raise error

        ticket = engine.submit("ab", logits_processor=[Hook(lambda: gate.wait(60))], **NEW)
        other = engine.submit("ab", **NEW)
        for t in (ticket, other):
            t.future.add_done_callback(fail)
            t.future.add_done_callback(fail)

        async def waits():
            gate.set()
            return [await ticket, await other]

        assert [g.token_ids for g in asyncio.run(waits())] == [expected] * 2, "callbacks that follow are called"
        assert engine.submit("ab", **NEW).result(60).token_ids == expected
        assert len(called) == 4


def test_a_callback_of_a_request_that_cannot_run_can_use_other_threads(base):
    """The callback runs without the engine's lock, so that another thread can submit meanwhile."""
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine:
        gate, called, answers = threading.Event(), threading.Event(), []

        def callback(_):
            other = threading.Thread(target=lambda: answers.append(engine.submit("ab", max_new_tokens=1)))
            other.start()
            other.join(60)
            called.set()

        engine.submit("ab", logits_processor=[Hook(lambda: gate.wait(60))], **NEW)
        impossible = engine.submit("ab", max_new_tokens=4, num_beams=3)
        impossible.future.add_done_callback(callback)
        gate.set()
        assert impossible.future.exception(60) is not None
        assert called.wait(60)
        assert answers[0].result(60).finish_reason


def test_a_future_that_other_code_has_set_harms_no_request(base):
    with Engine(base, **HOW) as engine:
        gate = threading.Event()
        expected = engine.generate(["ab"], **NEW)[0].token_ids
        first = engine.submit("ab", logits_processor=[Hook(lambda: gate.wait(60))], **NEW)
        second = engine.submit("ab", **NEW)
        first.future.set_exception(ValueError("mine"))
        gate.set()
        assert second.result(60).token_ids == expected
        with pytest.raises(ValueError, match="mine"):
            first.result(60)


# ---- two readers of a stream ----


def test_a_stream_with_two_readers_is_refused(base):
    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], **NEW)[0].text
        stream = engine.stream("ab", **NEW)
        reader, errors = iter(stream), []
        pieces = [next(reader)]

        def second():
            with pytest.raises(ConfigError, match="being read by another"):
                next(iter(stream))
            errors.append(1)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join(60)
        assert errors == [1]
        assert "".join([*pieces, *reader]) == expected
        assert list(stream) == [], "a stream that has ended can be read by everyone"


def test_a_stream_with_two_tasks_is_refused(base):
    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], **NEW)[0].text

        async def read(stream):
            return "".join([piece async for piece in stream])

        async def both():
            stream = engine.astream("ab", **NEW)
            return await asyncio.gather(read(stream), read(stream), return_exceptions=True)

        found = asyncio.run(both())
        assert isinstance(found[1], ConfigError)
        assert found[0] == expected

        async def leave_and_read_again():
            stream = engine.astream("ab", max_new_tokens=60, min_new_tokens=60)
            async for _ in stream:
                break
            await read(stream)
            return stream.generation.finish_reason

        assert asyncio.run(leave_and_read_again()) in ("cancelled", "length")
