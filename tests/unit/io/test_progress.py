"""Reports of long work: a line every 10 s without a terminal, a bar on one, nothing if it is switched off."""

from __future__ import annotations

import contextlib
import io
import sys
import threading

import pytest

from prefixfast.io.progress import Progress, draws_bars, show_progress, track
from prefixfast.io.text import counted, duration, rate


class Clock:
    """Clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stands_for_stderr(monkeypatch, file: io.StringIO) -> io.StringIO:
    """Set standard error in a test itself, since pytest sets its own between fixtures and test."""
    monkeypatch.setattr(sys, "stderr", file)
    return file


def at(clock: Clock, progress: Progress, seconds: float) -> None:
    clock.now = seconds
    progress.tick()


def test_a_line_every_ten_seconds_says_units_details_rates_and_time_left(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with Progress("train", 40, "steps", clock=clock) as work:
        work.details = lambda: "loss 1.25"
        work.update(4, rows=40, tokens=3000)
        at(clock, work, 9.9)
        assert stderr.getvalue() == ""
        at(clock, work, 10.0)
        assert stderr.getvalue() == "train: 4 of 40 steps, loss 1.25, 4 rows/s, 300 tokens/s, 1 min 30 s left\n"
        work.update(16, rows=160, tokens=12000)
        at(clock, work, 19.0)
        assert stderr.getvalue().count("\n") == 1
        at(clock, work, 20.0)
        assert stderr.getvalue().endswith("train: 20 of 40 steps, loss 1.25, 10 rows/s, 750 tokens/s, 20 s left\n")
        work.update(20)
        clock.now = 25.0
    assert stderr.getvalue().splitlines()[2:] == [
        "train: 40 of 40 steps, loss 1.25, 8 rows/s, 600 tokens/s, finished after 25 s"
    ]


def test_work_without_units_says_its_time(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with Progress("load gpt2", clock=clock) as work:
        at(clock, work, 11.0)
        clock.now = 75.0
    assert stderr.getvalue() == "load gpt2: 11 s so far\nload gpt2: finished after 1 min 15 s\n"


def test_short_work_is_silent_and_details_are_not_asked_for(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with Progress("train", 3, "steps", clock=clock) as work:
        work.details = lambda: pytest.fail("a loss was read although no line is due")
        for i in range(3):
            work.update()
            at(clock, work, i)
    assert stderr.getvalue() == ""


def test_the_time_left_counts_only_what_this_run_has_done(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with Progress("train", 100, "steps", initial=90, clock=clock) as work:
        work.update(5)
        at(clock, work, 10.0)
    assert stderr.getvalue().splitlines()[0] == "train: 95 of 100 steps, 10 s left"


def test_a_part_of_the_work_reports_in_place_of_the_whole(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with Progress("train", 9, "steps", clock=clock) as whole:
        whole.update()
        with Progress("evaluate", 4, "examples", clock=clock) as part:
            part.update()
            clock.now = 10.0
            part.tick()
            whole.tick()
        clock.now = 20.0
        whole.tick()
    labels = [line.partition(":")[0] for line in stderr.getvalue().splitlines()]
    assert labels == ["evaluate", "evaluate", "train", "train"]


def test_short_parts_do_not_keep_the_whole_from_its_reports(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with Progress("read rows", 3, "names", clock=clock) as whole:
        for i in range(3):
            with Progress(f"read {i}.csv", clock=clock):
                at(clock, whole, 6.0 * i)
            whole.update()
    assert stderr.getvalue().splitlines()[0] == "read rows: 2 of 3 names, 6.0 s left"


def test_an_error_ends_the_reports_without_the_word_finished(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with contextlib.suppress(KeyError), Progress("score", 2, "requests", clock=clock) as work:
        at(clock, work, 10.0)
        raise KeyError
    assert "finished" not in stderr.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_off_is_silent_also_for_parts_that_do_not_say_it(kind, clock, monkeypatch):
    out = stands_for_stderr(monkeypatch, kind())
    before = threading.active_count()
    with show_progress(False), show_progress(None), Progress("load", clock=clock):
        assert threading.active_count() == before
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_same_words(clock, monkeypatch):
    terminal = stands_for_stderr(monkeypatch, Terminal())
    with Progress("generate", 8, "requests", clock=clock) as work:
        work.details = lambda: "of 3 users"
        work.update(2, tokens=50)
        at(clock, work, 0.4)
        assert terminal.getvalue() == ""
        at(clock, work, 5.0)
        drawn = terminal.getvalue()
    assert "generate:  25%" in drawn
    assert "2/8" in drawn
    assert "of 3 users, 10 tokens/s" in drawn
    assert "\n" not in drawn


def test_a_bar_is_drawn_without_a_terminal_if_it_is_asked_for(clock, monkeypatch):
    stderr = stands_for_stderr(monkeypatch, io.StringIO())
    with show_progress(True), Progress("generate", 8, "requests", clock=clock) as work:
        assert draws_bars()
        at(clock, work, 1.0)
    assert "0/8" in stderr.getvalue()


def test_a_standard_error_that_is_closed_or_missing_does_not_end_the_work(clock, monkeypatch):
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed)
    with Progress("load", clock=clock) as work:
        closed.close()
        at(clock, work, 10.0)
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("load", 3, "files", clock=clock) as work:
        work.update()


def test_a_thread_writes_the_line_while_the_work_stands(monkeypatch):
    """The thread that works does not call `tick`; an event says that the line is there."""
    stands_for_stderr(monkeypatch, io.StringIO())
    written = threading.Event()
    monkeypatch.setattr("prefixfast.io.progress.LINE_SECONDS", 1e-3)
    monkeypatch.setattr("prefixfast.io.progress._write", lambda text: written.set())
    with Progress("load"):
        assert written.wait(60)


def test_times_rates_and_counts():
    assert [duration(s) for s in (0.04, 9.94, 44.6, 59.6, 125, 3725)] == [
        "0.0 s",
        "9.9 s",
        "45 s",
        "1 min 0 s",
        "2 min 5 s",
        "1 h 2 min",
    ]
    assert [rate(x) for x in (0, 0.0123, 4.56, 1234.5)] == ["0", "0.012", "4.6", "1234"]
    assert [counted(n, "prefix", "prefixes") for n in (0, 1, 2)] == ["0 prefixes", "1 prefix", "2 prefixes"]


def test_an_error_in_the_work_on_an_item_ends_the_reports_while_its_traceback_is_kept():
    def work() -> None:
        with track("abc", "read", 3, "files") as each:
            for letter in each:
                assert letter == "a"

    before = threading.active_count()
    with pytest.raises(AssertionError) as kept:
        work()
    assert threading.active_count() == before
    with Progress("next") as following:
        assert following._outer is None
    assert kept.tb is not None


def test_an_interrupt_at_the_end_of_the_work_leaves_no_work_behind(monkeypatch):
    def interrupted(self: Progress) -> str:
        raise KeyboardInterrupt

    work = Progress("work").__enter__()
    work._is_shown = True
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work.__exit__(None, None, None)
    with Progress("next") as following:
        assert following._outer is None


def test_a_standard_error_that_was_closed_is_no_terminal(monkeypatch):
    stands_for_stderr(monkeypatch, io.StringIO()).close()
    assert not draws_bars()
    with Progress("work") as progress:
        progress.tick()


def test_a_bar_on_a_broken_standard_error_does_not_end_the_work(clock, monkeypatch):
    class Broken(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    stands_for_stderr(monkeypatch, Broken())
    with Progress("train", 4, "steps", clock=clock) as progress:
        at(clock, progress, 1)
        progress.update(4)
    assert progress.done == 4
