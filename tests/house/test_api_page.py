"""docs/api.md and the examples in docstrings: they run as they stand there, and no public name is missing from them."""

from __future__ import annotations

import doctest
import re
from types import SimpleNamespace

import huggingface_hub
import pytest

from oracles import ROOT
from prefixfast import unload

PAGE = ROOT / "docs" / "api.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.REPORT_NDIFF


class Hub:
    """In place of the hub: the commit of an upload."""

    def __init__(self, token: str | None) -> None: ...
    def create_repo(self, *_, **__) -> None: ...
    def upload_folder(self, *, repo_id: str, **_):
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/0123")


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A folder with a base in it is the current one."""
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-gpt2").symlink_to(folder)
    yield tmp_path
    unload()


def commands(text: str) -> list[tuple[str, str]]:
    """Command lines of a console block, each with the output that the page shows."""
    return re.findall(r"^\$ (prefixfast .*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)


def test_the_page_runs(here, cli):
    """One block after the other, in one namespace."""
    text = PAGE.read_text(encoding="utf8")
    names, wrong, examples, lines = {}, list[str](), 0, 0
    for block in BLOCK.finditer(text):
        if block[1] == "pycon":
            case = doctest.DocTestParser().get_doctest(block[2], names, PAGE.name, str(PAGE), text.count("\n", 0, block.start(2)))
            examples += doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(case, out=wrong.append, clear_globs=False).attempted
            names = case.globs
        for command, expected in commands(block[2]) if block[1] == "console" else ():
            done = cli(*command.removeprefix("prefixfast ").split())
            if done.code != 0 or not doctest.OutputChecker().check_output(expected, done.out, FLAGS):
                wrong.append(f"$ {command}\nexit status {done.code}\n{done.err}expected\n{expected}got\n{done.out}")
            lines += 1
    assert not wrong, "".join(wrong)
    assert examples > 80
    assert lines > 15
