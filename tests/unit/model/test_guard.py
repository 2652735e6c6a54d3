"""`BaseGuard`: threads run a base model together, one at a time changes it, and nobody waits for ever."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import forked
from prefixfast.errors import ConfigError
from prefixfast.model.guard import BaseGuard


@pytest.fixture
def guard():
    return BaseGuard()


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Stay:
    """A context of a guard in another thread, which is left when it is told."""

    def __init__(self, threads, context, log=None, name=None):
        self.entered, self.leave = threading.Event(), threading.Event()
        self.future = threads.submit(self._run, context, log, name)

    def _run(self, context, log, name):
        with context:
            if log is not None:
                log.append(name)
            self.entered.set()
            assert self.leave.wait(60)

    def end(self):
        self.leave.set()
        self.future.result(60)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def num_waiting(guard):
    return sum(not hold.is_active for hold in guard._holds)


def test_threads_run_together(guard, threads):
    barrier = threading.Barrier(4)

    def run():
        with guard.running():
            barrier.wait(60)

    for future in [threads.submit(run) for _ in range(4)]:
        future.result(60)
    assert not guard._holds


def test_a_change_waits_for_runs_and_runs_wait_for_a_change(guard, threads):
    log = []
    run = Stay(threads, guard.running(), log, "run")
    assert run.entered.wait(60)
    change = Stay(threads, guard.changing(), log, "change")
    wait_until(lambda: num_waiting(guard) == 1)
    later = [Stay(threads, guard.running(), log, "later") for _ in range(2)]  # these must not starve the change
    wait_until(lambda: num_waiting(guard) == 3)
    assert guard.is_awaited
    assert log == ["run"]
    run.end()
    assert change.entered.wait(60)
    assert log == ["run", "change"]
    assert num_waiting(guard) == 2
    change.end()
    for stay in later:
        assert stay.entered.wait(60), "runs that waited run together"
    for stay in later:
        stay.end()
    assert not guard.is_awaited


def test_changes_exclude_each_other_and_keep_their_order(guard, threads):
    log, stays = [], []
    for i in range(3):
        stays.append(Stay(threads, guard.changing(), log, i))
        wait_until(lambda: len(guard._holds) == len(stays))
    for i, stay in enumerate(stays):
        assert stay.entered.wait(60)
        assert log == list(range(i + 1))
        stay.end()


def test_a_thread_enters_again_what_it_has(guard, threads):
    with guard.running(), guard.running():
        waiting = Stay(threads, guard.changing())
        wait_until(lambda: guard.is_awaited)
        with guard.running():  # does not wait behind the change, which waits for this thread
            pass
        with pytest.raises(ConfigError), guard.changing():
            pass
    assert waiting.entered.wait(60)
    waiting.end()
    with guard.changing(), guard.changing(), guard.running():
        pass
    assert not guard._holds


def test_a_run_can_be_left_in_another_thread(guard, threads):
    run = guard.running()
    threads.submit(run.__enter__).result(60)
    run.__exit__(None, None, None)
    with guard.changing():
        pass


def test_an_engine_with_a_thread_excludes_changes(guard, threads):
    guard.add_engine()
    for context in (guard.changing(), guard.training()):
        with pytest.raises(ConfigError), context:
            pass
    guard.remove_engine()
    run = Stay(threads, guard.running())
    assert run.entered.wait(60)
    change = Stay(threads, guard.changing())
    wait_until(lambda: guard.is_awaited)
    guard.add_engine()  # whose requests need not end, so that the waiting change must not wait for them
    with pytest.raises(ConfigError):
        change.future.result(60)
    run.end()
    guard.remove_engine()
    with guard.changing():
        with pytest.raises(ConfigError):
            guard.add_engine()
        threads.submit(guard.add_engine).result(60)  # its requests wait for the end of this change
    guard.remove_engine()
    with guard.training(), pytest.raises(ConfigError):
        threads.submit(guard.add_engine).result(60)
    guard.add_engine()


def test_an_error_inside_frees_the_guard(guard):
    for context in (guard.running, guard.changing, guard.training):
        with pytest.raises(ZeroDivisionError), context():
            raise ZeroDivisionError
    with guard.changing():
        pass
    guard.add_engine()


@pytest.fixture
def interrupts_while_waiting(guard):
    """SIGINT interrupts the main thread only while a thread waits for the guard."""

    def handler(*_):
        if guard.is_awaited:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_while_waiting")
def test_an_interrupt_of_a_thread_that_waits_leaves_the_others_alone(guard, threads):
    run = Stay(threads, guard.running())
    assert run.entered.wait(60)
    main = threading.get_ident()

    def interrupt():
        wait_until(lambda: guard.is_awaited)
        while guard.is_awaited:  # Python acts on a signal right before a wait only when a second one ends the wait
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.5)

    done = threads.submit(interrupt)
    with pytest.raises(KeyboardInterrupt), guard.changing():
        pass
    done.result(60)
    assert not guard.is_awaited
    run.end()
    with guard.changing():
        pass


@pytest.mark.parametrize("holder", ["running", "changing"])
def test_a_forked_process_has_no_other_threads(guard, threads, holder):
    """Those of the parent that ran the model do not exist there, and those that changed it never give it back."""
    stay = Stay(threads, getattr(guard, holder)())
    assert stay.entered.wait(60)
    guard.add_engine() if holder == "running" else None

    def work():
        if holder == "running":
            with guard.changing():
                return
        with pytest.raises(ConfigError), guard.running():
            pass

    assert forked.end(forked.start(work)) == 0
    stay.end()
