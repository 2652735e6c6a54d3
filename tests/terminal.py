"""A command in a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence

from oracles import ROOT


def at_terminal(
    arguments: Sequence[object], steps: Sequence[tuple[str, str]] = (), *, columns: int = 80
) -> tuple[int, str]:
    """Run ``prefixfast`` in a terminal.

    Args:
        arguments: Arguments of the command.
        steps: Patterns to wait for in the new output, each with the keys to type then.
        columns: Width of the terminal.

    Returns:
        Exit status, and everything that the terminal showed, with plain line ends.
    """
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, columns))
    own = {"PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "prefixfast", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | own,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    shown, at = b"", 0
    left = list(steps)
    try:
        while data := _read(master):
            shown += data
            while left and (found := re.compile(left[0][0].encode(), re.DOTALL).search(shown, at)):
                at = found.end()
                os.write(master, left.pop(0)[1].encode())
        code = process.wait(60)
    finally:
        process.kill()
        os.close(master)
    text = shown.decode().replace("\r\n", "\n")
    assert not left, f"exit status {code}: {text}"
    return code, text


def _take_terminal() -> None:
    """Make standard input the terminal of the new process, whose interrupts a background process would ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read(master: int) -> bytes:
    """New output, empty at the end."""
    try:
        return os.read(master, 65536)
    except OSError:  # the command has ended
        return b""
