"""Pages of docs/first-hour as a new user runs them: every command in a shell, with the output that the page shows."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pages import blocks

NUMBER = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")
GAP = re.compile(r"\.\.\.")
COMMAND = re.compile(r"^\$ (.*\n(?:> .*\n)*)((?:(?!\$ ).*\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A command of a page and what came of it.

    Attributes:
        command: Command as a shell reads it.
        expected: Output that the page shows; ``...`` stands for any text.
        output: Output, with the error messages in it.
        seconds: Seconds that the command took.
    """

    command: str
    expected: str
    output: str
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the output is the page's."""
        return same(self.expected, self.output)


def same(expected: str, output: str) -> bool:
    """Equality of two outputs; ``...`` is any text, and numbers with decimals may differ by 5 %."""
    parts = [NUMBER.split(part) for part in GAP.split(expected)]
    pattern = "(?:.*?)".join(f"({NUMBER.pattern})".join(map(re.escape, part)) for part in parts)
    found = re.fullmatch(pattern, output, re.DOTALL)
    shown = [n for part in GAP.split(expected) for n in NUMBER.findall(part)]
    return found is not None and all(
        math.isclose(float(a), float(b), rel_tol=0.05) for a, b in zip(shown, found.groups(), strict=True)
    )


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """Commands of a page with the output that the page shows."""
    for kind, text, _ in blocks(page):
        for command, expected in COMMAND.findall(text) if kind == "console" else ():
            yield command.replace("\n> ", "\n").rstrip("\n"), expected


def walk(page: Path, folder: Path, env: Mapping[str, str]) -> Iterator[Step]:
    """Run the commands of a page in a folder. ``$ cat FILE`` writes the file that the page shows."""
    for command, expected in steps(page):
        if command.startswith("cat ") and not (folder / command[4:]).exists():
            (folder / command[4:]).write_text(expected, encoding="utf-8")
            continue
        start = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        yield Step(command, expected, done.stdout, time.perf_counter() - start)
