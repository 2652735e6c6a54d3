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
GAP = re.compile(r"^\.\.\.\n|\.\.\.", re.MULTILINE)
PROGRESS = re.compile(r"^\w[\w ]*: .*(?: left|finished after .*)\n", re.MULTILINE)  # a slow machine prints more lines
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
    """Equality of two outputs without their progress lines.

    ``...`` is any text, a line of it any number of lines, and numbers with decimals may differ by 5 %.
    """
    expected, output = PROGRESS.sub("", expected), PROGRESS.sub("", output)
    pattern, shown, at = "", NUMBER.findall(GAP.sub("", expected)), 0
    for gap in [*GAP.finditer(expected), None]:
        text = expected[at : gap.start() if gap else None]
        pattern += f"({NUMBER.pattern})".join(map(re.escape, NUMBER.split(text)))
        pattern += "" if gap is None else "(?:.*\n)*?" if gap[0].endswith("\n") else "[^\n]*?"
        at = gap.end() if gap else at
    found = re.fullmatch(pattern, output)
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
