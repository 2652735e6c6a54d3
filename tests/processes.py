"""Processes that train together, forked from one that has imported everything and never runs a backward pass."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 280  # after which a process that hangs is ended by its alarm


def together(size: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """Results of a function in forked processes, in an environment as torchrun sets it; an exception is a result.

    Args:
        size: Number of processes. One process has no such environment.
        work: Function that each process calls.
        folder: Folder for the results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [_start(rank, size, port, work, folder / f"{rank}.pickle") for rank in range(size)]
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return [
        pickle.loads((folder / f"{rank}.pickle").read_bytes()) if status == 0 else f"status {status}"
        for rank, status in enumerate(statuses)
    ]


def _start(rank: int, size: int, port: int, work: Callable[[], Any], target: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    import signal

    signal.alarm(SECONDS)
    status = 1
    try:
        if size > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in numbers.items()}}
        try:
            result = work()
        except Exception as e:
            traceback.print_exc()
            result = f"{type(e).__name__}: {e}"
        target.write_bytes(pickle.dumps(result))
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)
    return 0
