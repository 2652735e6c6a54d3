"""Interrupts at any line of a call: nothing hangs afterwards, and the same engine gives the right texts."""

import linecache
import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest

import prefixfast
from prefixfast import Engine, PrefixStore
from prefixfast.engine.step_runner import StepRunner

PACKAGE = str(Path(prefixfast.__file__).parent)
HOW = {"max_num_seqs": 4, "max_model_len": 64, "host_prefix_memory": 1}
BATCH = ["ab", "cde", "f", "gh ij", "k"]
NAMES = ["a", "b", None, "a", "c"]
LOADS = ("prefix_cache.py", "prefix_loader.py")
NEW = {"max_new_tokens": 5, "min_new_tokens": 5}
pytestmark = pytest.mark.timeout(120)


class Interrupt:
    """Trace function that raises KeyboardInterrupt at the k-th line of prefixfast, or of some of its files.

    The line of a ``with`` statement is left out, since it is also reported before the exit of the statement releases a
    lock, where Python runs no signal handler.
    """

    def __init__(self, line: int, files: tuple[str, ...] = ("",)) -> None:
        self.line, self.files, self.count, self.where = line, files, 0, ""

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        return self.in_frame if name.startswith(PACKAGE) and name.endswith(self.files) else None

    def in_frame(self, frame, event, arg):
        code = frame.f_code
        if event == "line" and not linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            self.count += 1
            if self.count == self.line:
                self.where = f"{code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.in_frame

    def run(self, call):
        """Result of the call, None if it was interrupted."""
        sys.settrace(self)
        try:
            return call()
        except KeyboardInterrupt:
            return None
        finally:
            sys.settrace(None)


@pytest.fixture
def store(make_prefix, tmp_path):
    store = PrefixStore(tmp_path / "store")
    for i, name in enumerate("abc"):
        store.put(name, make_prefix(i, length=3 + i))
    return store


def tokens(engine):
    return [g.token_ids for g in engine.generate(BATCH, NAMES, progress=False, **NEW)]


def scores(engine):
    return [s.token_ids for s in engine.score(BATCH, NAMES, targets=["x"] * len(BATCH))]


def results(engine):
    return [t.result(60).token_ids for t in [engine.submit(b, n, **NEW) for b, n in zip(BATCH, NAMES, strict=True)]]


def pieces(engine):
    return ["".join(engine.stream(b, n, **NEW)) for b, n in zip(BATCH, NAMES, strict=True)]


def pins(engine):
    for name in "ab":
        engine.pin(name)
        engine.unpin(name)
        engine.evict(name)
    return len(engine.resident()) >= 0


CALLS = {f.__name__: f for f in (tokens, scores, results, pieces, pins)}


def interrupt_everywhere(base, store, call, threaded, lines):
    """Interrupt a call at a share of its lines, and check the same engine after each of them."""
    with Engine(base, store=store, **HOW) as engine:
        if threaded:
            engine.submit("x", max_new_tokens=1).result(60)
        expected = tokens(engine)
        engine.evict("a")  # so that the call loads it
        whole = Interrupt(0)
        usual = whole.run(lambda: CALLS[call](engine))
        interrupted = 0
        for line in lines(whole.count):
            engine.evict("a")
            engine.pin("b")
            interrupt = Interrupt(line)
            got = interrupt.run(lambda: CALLS[call](engine))
            interrupted += got is None
            assert got in (None, usual), interrupt.where
            assert tokens(engine) == expected, interrupt.where
            if call != "pins":
                assert [r.name for r in engine.resident() if r.pinned] == ["b"], interrupt.where
        return interrupted


@pytest.mark.parametrize(
    ("call", "threaded"), [(c, t) for c in CALLS for t in (False, True) if t or c not in ("results", "pieces")]
)
def test_an_interrupt_at_any_line_leaves_a_usable_engine(base, store, call, threaded):
    interrupted = interrupt_everywhere(
        base, store, call, threaded, lambda count: random.Random(1).sample(range(1, count), min(8, count - 1))
    )
    assert interrupted > 0


def test_interrupts_in_the_hand_over_of_a_load(base, store):
    """The lines of the prefix cache and the loader are few among those of a step, so each of them is interrupted."""
    with Engine(base, store=store, **HOW) as engine:
        expected = tokens(engine)
        engine.evict("a")
        whole = Interrupt(0, LOADS)
        whole.run(lambda: tokens(engine))
        assert whole.count > 50
        for line in range(1, whole.count, 3):
            engine.evict("a")
            interrupt = Interrupt(line, LOADS)
            interrupt.run(lambda: tokens(engine))
            assert tokens(engine) == expected, interrupt.where


def test_a_second_interrupt_during_the_repair_leaves_a_usable_engine(base, store):
    with Engine(base, store=store, **HOW) as engine:
        expected = tokens(engine)

        class Twice(Interrupt):
            def in_frame(self, frame, event, arg):
                if event == "line" and frame.f_code.co_name == "restart":
                    self.line = self.count + 1 + self.later
                    self.later = 10**9
                return super().in_frame(frame, event, arg) and self.in_frame

        for later in range(0, 60, 7):
            interrupt = Twice(400 + later)
            interrupt.later = later
            interrupt.run(lambda: tokens(engine))
            assert tokens(engine) == expected


def test_an_interrupted_eviction_leaves_no_row_of_the_prefix(base, store):
    with Engine(base, store=store, **HOW) as engine:
        whole = Interrupt(0, LOADS)
        tokens(engine)
        whole.run(lambda: engine.evict("c"))
        assert whole.count > 10
        for line in range(1, whole.count + 1):
            tokens(engine)
            digest = store.info("c").digest
            cache = engine.loop.prefix_cache
            row, _ = engine.loop.scheduler.prefix_state(cache.numbers[digest])
            rows = [t[row : row + store.info("c").length] for kv in engine.loop.arena.layers for t in kv]
            assert all(bool(t.any()) for t in rows)
            interrupt = Interrupt(line, LOADS)
            interrupt.run(lambda: engine.evict("c"))
            assert engine.evict("c") is True
            assert not any(bool(t.any()) for t in rows), interrupt.where


def test_a_failed_restart_is_tried_again(base, monkeypatch):
    with Engine(base, **HOW) as engine:
        expected = engine.generate(["ab"], **NEW)[0].token_ids
        monkeypatch.setattr(StepRunner, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        loader = engine.loop.prefix_cache.loader
        real, loader.restart = loader.restart, lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            engine.generate(["ab"], **NEW)
        loader.restart = real
        monkeypatch.undo()
        assert engine.generate(["ab"], **NEW)[0].token_ids == expected


@pytest.mark.parametrize("closed", ["generate", "thread"])
def test_an_interrupted_close_can_be_completed(base, closed):
    whole, line = 100, 0
    while line < whole:
        engine = Engine(base, **HOW)
        engine.generate(["ab"], **NEW)
        if closed == "thread":
            engine.submit("ab", **NEW)
        interrupt = Interrupt(line)
        interrupt.run(engine.close)
        engine.close()
        assert not engine.loop.arena.layers
        whole, line = (whole if line else interrupt.count), line + 2
    assert whole > 10


# ---- long ----


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("threaded", [False, True])
def test_five_hundred_interrupts_at_lines(base, store, threaded):
    interrupted = interrupt_everywhere(
        base, store, "tokens", threaded, lambda count: [random.Random(i).randrange(1, count) for i in range(500)]
    )
    assert interrupted > 450


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("threaded", [False, True])
def test_five_hundred_signals(base, store, threaded):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    chance, interrupted = random.Random(5), 0
    try:
        with Engine(base, store=store, **HOW) as engine:
            if threaded:
                engine.submit("x", max_new_tokens=1).result(60)
            expected = tokens(engine)
            for _ in range(500):
                engine.evict("a")
                timer = threading.Timer(chance.uniform(0, 0.06), lambda: os.kill(os.getpid(), signal.SIGINT))
                try:
                    timer.start()
                    while True:
                        assert tokens(engine) == expected
                except KeyboardInterrupt:
                    interrupted += 1
                timer.join()
                assert tokens(engine) == expected
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted == 500
