"""The pages of docs/: examples run as they stand there, links lead somewhere, each command has an example."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from oracles import ROOT
from pages import blocks, run_page
from prefixfast import unload
from prefixfast.cli import app

PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = [p for p in PAGES if p.name != "api.md" and any(kind in ("pycon", "console") for kind, *_ in blocks(p))]
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "kernels/README.md")]
COMMANDS = ROOT / "docs" / "command-line.md"


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A folder with a base in it is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-gpt2").symlink_to(folder)
    yield tmp_path
    unload()


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_the_examples_of_the_page_run(page, here, cli):
    done = run_page(page, cli)
    assert not done.wrong, "".join(done.wrong)
    assert done.examples + done.lines > 3


def leaves(command: Any, path: tuple[str, ...] = ()) -> list[str]:
    """Full names of all commands."""
    if not hasattr(command, "commands"):
        return [" ".join(path)]
    return [name for word, own in command.commands.items() for name in leaves(own, (*path, word))]


def test_every_command_has_an_example():
    text = COMMANDS.read_text(encoding="utf8")
    names = leaves(typer.main.get_command(app))
    assert len(names) > 15
    shown = [n for n in names if re.search(rf"^(\$|   ) prefixfast {n}( |$)", text, re.MULTILINE)]
    assert shown == names


def anchors(text: str) -> set[str]:
    """The links that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf8")), link


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    """Paths in backticks that begin with a folder of the repository."""
    text = page.read_text(encoding="utf8")
    named = re.findall(r"`((?:python|kernels|rust|tests|benches|docs|examples)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
