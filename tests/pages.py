"""Pages of the documentation as the tests run them: ``pycon`` blocks are doctests, ``console`` blocks command lines."""

from __future__ import annotations

import doctest
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+\.\d+")
FLAGS = doctest.ELLIPSIS | doctest.REPORT_NDIFF
Profile = Callable[..., None]


@dataclass
class Run:
    """What came of a page's examples.

    Attributes:
        wrong: Examples with another output, as text.
        examples: Number of Python examples.
        lines: Number of command lines.
    """

    wrong: list[str] = field(default_factory=list)
    examples: int = 0
    lines: int = 0


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Kind, text and line number of every code block."""
    text = page.read_text(encoding="utf8")
    return [(block[1], block[2], text.count("\n", 0, block.start(2))) for block in BLOCK.finditer(text)]


def console(text: str) -> list[tuple[str, str]]:
    """Command lines of a console block, each with the output that the page shows."""
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)


def with_input(cli: Callable[..., Any], arguments: list[str]) -> Any:
    """Result of a command whose last arguments can be ``< FILE``."""
    if "<" not in arguments:
        return cli(*arguments)
    at, before = arguments.index("<"), sys.stdin
    with Path(arguments[at + 1]).open(encoding="utf8") as sys.stdin:
        try:
            return cli(*arguments[:at])
        finally:
            sys.stdin = before


def run_page(page: Path, cli: Callable[..., Any], watch: Profile | None = None) -> Run:
    """Run one block after the other, in one namespace and in the current folder.

    ``$ cat FILE`` writes the file that the page shows; all other command lines are those of prefixfast, some with
    ``< FILE`` at the end.

    Args:
        page: Page of the documentation.
        cli: Command line of prefixfast, the fixture of the tests.
        watch: Profile function that is active while Python examples run.
    """
    found, names = Run(), dict[str, Any]()
    for kind, text, line in blocks(page):
        if kind == "pycon":
            case = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), line)
            sys.setprofile(watch)
            try:
                done = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(
                    case, out=found.wrong.append, clear_globs=False
                )
            finally:
                sys.setprofile(None)
            found.examples, names = found.examples + done.attempted, case.globs
        for command, expected in console(text) if kind == "console" else ():
            found.lines += 1
            program, *arguments = shlex.split(command)
            if program == "cat":
                Path(arguments[0]).parent.mkdir(exist_ok=True)
                Path(arguments[0]).write_text(expected, encoding="utf8")
                continue
            ran = with_input(cli, arguments)
            if ran.code != 0 or not doctest.OutputChecker().check_output(expected, ran.out, FLAGS):
                shown = f"$ {command}\nexit status {ran.code}\n{ran.err}expected\n{expected}got\n{ran.out}"
                found.wrong.append(shown)
    return found


def same(shown: str, printed: str) -> bool:
    """Equality of two outputs; numbers with decimals may differ by 5 %, which covers the rounding of other CPUs."""
    numbers = [list(map(float, NUMBER.findall(text))) for text in (shown, printed)]
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    return all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(*numbers, strict=True))
