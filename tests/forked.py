"""Functions in forked processes, which need no time to import torch."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# Audit events of all steps of a save that touch the disk.
STEPS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.utime",
    "shutil.rmtree",
    "fcntl.flock",
    "os.link",
    "os.listdir",
}
FAILED = 1 << 8  # status of a child whose work raised


def start(work: Callable[[], object]) -> int:
    """Run ``work`` in a child process; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    return pid


def end(pid: int) -> int:
    """Wait for a child process; returns its status."""
    return os.waitpid(pid, 0)[1]


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Kill a child process at one step of its work, from 0; returns False if the work has fewer steps."""

    def doomed() -> None:
        seen = 0

        def kill(event: str, _: object) -> None:
            nonlocal seen
            seen += event in STEPS
            if event in STEPS and seen > step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        work()

    status = end(start(doomed))
    assert status in (0, signal.SIGKILL), status
    return status != 0


def interrupted_at(step: int, work: Callable[[], object], other: Callable[[], object]) -> bool:
    """Run ``other`` once in the middle of ``work``, as another process would; both in one child process.

    Args:
        step: Number of the step of ``work``, from 0, before which ``other`` runs.
        work: Function that is interrupted. It must not raise.
        other: Function that runs in between.

    Returns:
        Whether ``work`` has that many steps.
    """

    def both() -> None:
        seen, busy, met = 0, False, False

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen, busy, met
            # The 256 buckets of a store are listed in one loop, whose steps are alike.
            is_bucket = event in ("os.listdir", "os.scandir") and len(Path(str(arguments[0])).name) == 2
            if busy or is_bucket or event not in STEPS | {"os.scandir"}:
                return
            if seen == step and not met:
                busy = met = True
                other()
                busy = False
            seen += 1

        sys.addaudithook(hook)
        work()
        os._exit(0 if met else 7)

    status = end(start(both))
    assert status in (0, 7 << 8), status
    return status == 0
