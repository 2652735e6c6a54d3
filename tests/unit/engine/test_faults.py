"""An exception planted at each step of a request's life, in every call, ends this request only."""

import asyncio
import threading

import pytest

from prefixfast import Engine
from prefixfast.engine.output import RequestOutput

HOW = {"max_num_seqs": 8, "max_model_len": 64}
NEW = {"max_new_tokens": 6, "min_new_tokens": 6}
SAMPLED = {**NEW, "do_sample": True, "temperature": 1.5}
PROMPTS = ["ab", "cde", "zz", "f", "gh"]
VICTIM = 2
pytestmark = pytest.mark.timeout(30)


class PlantedError(Exception):
    """Error that the tests plant."""


def fail_if(real, is_victim):
    """``real``, or an error if ``is_victim`` of its arguments."""

    def function(*args, **kwargs):
        if is_victim(*args, **kwargs):
            raise PlantedError
        return real(*args, **kwargs)

    return function


def plant(point, engine, prefixes, tokens, monkeypatch):
    """Plant an error at a step of the victim's life."""
    victim = engine.model.require_tokenizer().encode([PROMPTS[VICTIM]])[0].tolist()

    def is_victim(*args, **_):
        requests = [a.request if isinstance(a, RequestOutput) else a for a in args]
        return any(getattr(r, "prompt_ids", None) is not None and r.prompt_ids.tolist() == victim for r in requests)

    loop = engine.loop
    loader, tokenizer = loop.prefix_cache.loader, engine.model.require_tokenizer()
    owner, name, wanted = {
        "admission": (loop, "add", is_victim),
        "load": (loader, "_host_kv", lambda number, prefix: prefix.digest == prefixes[VICTIM].digest),
        "prefill": (loop.batch, "start", is_victim),
        "choose": (loop.batch.sampler, "set_row", lambda row, params, number: params.seed == VICTIM),
        "outputs": (loop.outputs, "start", is_victim),
        "token": (loop.outputs, "append", is_victim),
        "end of tokens": (loop.outputs, "finished", lambda number: is_victim(loop.requests[number])),
        "detokenize": (type(tokenizer), "decode", lambda _, sequences: tokens[VICTIM] in sequences),
        "finish": (RequestOutput, "to_generation", is_victim),
    }[point]
    monkeypatch.setattr(owner, name, fail_if(getattr(owner, name), wanted))


def generate(engine, prefixes):
    rows = [{"prompt": p, "params": {"seed": i}} for i, p in enumerate(PROMPTS)]
    got = engine.generate(rows, prefixes, on_error="return", progress=False, **SAMPLED)
    return [g.token_ids if g.error is None else g.error for g in got]


def outcome(wait):
    try:
        return wait().token_ids
    except PlantedError as e:
        return f"PlantedError: {e}"


def submit(engine, prefixes):
    tickets = [engine.submit(p, x, seed=i, **SAMPLED) for i, (p, x) in enumerate(zip(PROMPTS, prefixes, strict=True))]
    return [outcome(lambda t=t: t.result(30)) for t in tickets]


def agenerate(engine, prefixes):
    async def run():
        calls = (
            engine.agenerate(p, x, seed=i, **SAMPLED) for i, (p, x) in enumerate(zip(PROMPTS, prefixes, strict=True))
        )
        return await asyncio.gather(*calls, return_exceptions=True)

    return [
        f"PlantedError: {found}" if isinstance(found, PlantedError) else found.token_ids for found in asyncio.run(run())
    ]


def stream(engine, prefixes):
    streams = [engine.stream(p, x, seed=i, **SAMPLED) for i, (p, x) in enumerate(zip(PROMPTS, prefixes, strict=True))]

    def read(s):
        text = "".join(s)
        assert text == s.generation.text
        return s.generation

    return [outcome(lambda s=s: read(s)) for s in streams]


def astream(engine, prefixes):
    async def read(s):
        try:
            assert "".join([piece async for piece in s]) == s.generation.text
        except PlantedError as e:
            return f"PlantedError: {e}"
        return s.generation.token_ids

    async def run():
        streams = [
            engine.astream(p, x, seed=i, **SAMPLED) for i, (p, x) in enumerate(zip(PROMPTS, prefixes, strict=True))
        ]
        return await asyncio.gather(*map(read, streams))

    return asyncio.run(run())


CALLS = {"generate": generate, "generate in the thread": generate}
CALLS |= {f.__name__: f for f in (submit, agenerate, stream, astream)}
POINTS = ("admission", "load", "prefill", "choose", "outputs", "token", "end of tokens", "detokenize", "finish")


@pytest.fixture
def prefixes(make_prefix):
    return [make_prefix(i, length=2 + i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("point", POINTS)
def test_an_error_at_a_step_of_a_request_ends_this_request_only(base, prefixes, point, call, run_ahead, monkeypatch):
    with Engine(base, **HOW) as engine:
        engine.loop.run_ahead = run_ahead
        if call == "generate in the thread":
            engine.submit("x", max_new_tokens=1).result(30)
        expected = generate(engine, prefixes)
        for prefix in prefixes:
            engine.evict(prefix)
        plant(point, engine, prefixes, expected, monkeypatch)
        got = CALLS[call](engine, prefixes)
        assert got == [*expected[:VICTIM], "PlantedError: ", *expected[VICTIM + 1 :]]
        monkeypatch.undo()
        assert CALLS[call](engine, prefixes) == expected
        assert not engine.loop.requests
        assert engine.loop.scheduler.num_running == 0


# ---- calls without requests ----


def test_an_error_in_a_score_or_a_pin_leaves_a_usable_engine(base, make_prefix, monkeypatch):
    prefix = make_prefix()
    for threaded in (False, True):
        with Engine(base, **HOW) as engine:
            if threaded:
                engine.submit("x", max_new_tokens=1).result(30)
            expected = engine.score(["ab"], prefix, targets=["c"])[0].logprob
            monkeypatch.setattr("prefixfast.engine.score._target_logprobs", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.score(["ab"], prefix, targets=["c"])
            monkeypatch.undo()
            assert engine.score(["ab"], prefix, targets=["c"])[0].logprob == expected
            for name, call in (("set_pinned", engine.pin), ("set_pinned", engine.unpin), ("evict", engine.evict)):
                monkeypatch.setattr(engine.loop.prefix_cache, name, lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    call(prefix)
                monkeypatch.undo()
                call(prefix)
            assert engine.generate(["ab"], prefix, **NEW)[0].error is None


# ---- forwards ----


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("forward", ["prefill", "decode"])
def test_an_error_of_a_forward_ends_the_requests_of_this_forward(base, forward, threaded, monkeypatch):
    """Two requests run at a time. The third call of the forward fails; the queue goes on."""
    prompts = ["ab", "cde", "f", "gh", "ij", "kl"]
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine:
        if threaded:
            engine.submit("x", max_new_tokens=1).result(30)
        expected = [engine.generate([p], **NEW)[0].token_ids for p in prompts]
        real, calls = getattr(engine.loop.runner, forward), []

        def failing(buffer, header, *args):
            calls.append(len(header.prefill_ids if forward == "prefill" else header.decode_ids))
            if len(calls) == 2:
                raise MemoryError("planted")
            return real(buffer, header, *args)

        monkeypatch.setattr(engine.loop.runner, forward, failing)
        got = engine.generate(prompts, on_error="return", progress=False, **NEW)
        failed = [g.error for g in got if g.error is not None]
        assert failed == ["MemoryError: planted"] * calls[1]
        assert [g.token_ids for g in got if g.error is None] == [
            e for e, g in zip(expected, got, strict=True) if g.error is None
        ]
        calls.clear()
        with pytest.raises(MemoryError, match="planted"):
            engine.generate(prompts, progress=False, **NEW)
        monkeypatch.undo()
        assert [g.token_ids for g in engine.generate(prompts, progress=False, **NEW)] == expected


def test_a_failed_prefill_leaves_the_running_requests(base, monkeypatch):
    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], max_new_tokens=40, min_new_tokens=40)[0].token_ids
        gate, entered = threading.Event(), threading.Event()

        def wait(_, scores):
            entered.set()
            gate.wait(30)
            return scores

        running = engine.submit("ab", logits_processor=[wait], max_new_tokens=40, min_new_tokens=40)
        assert entered.wait(30)
        monkeypatch.setattr(engine.loop.runner, "prefill", lambda *_: 1 / 0)
        late = engine.submit("cd", **NEW)
        gate.set()
        with pytest.raises(ZeroDivisionError):
            late.result(30)
        assert running.result(30).token_ids == expected


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_of_the_engine_itself_ends_all_requests_and_the_engine_goes_on(
    base, make_prefix, threaded, monkeypatch
):
    with Engine(base, **HOW) as engine:
        prefix = make_prefix()
        if threaded:
            engine.submit("x", max_new_tokens=1).result(30)
        expected = engine.generate(["ab"], prefix, **NEW)[0].token_ids
        engine.pin(prefix)
        monkeypatch.setattr(engine.loop, "_read", lambda *_: 1 / 0)
        got = engine.generate(["ab", "cd"], prefix, on_error="return", **NEW) if threaded else None
        if threaded:
            assert {g.error for g in got} == {"ZeroDivisionError: division by zero"}
        else:
            with pytest.raises(ZeroDivisionError):
                engine.generate(["ab", "cd"], prefix, **NEW)
        monkeypatch.undo()
        assert engine.generate(["ab"], prefix, **NEW)[0].token_ids == expected
        assert [r.pinned for r in engine.resident()] == [True]
