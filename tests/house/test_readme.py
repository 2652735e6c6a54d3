"""The README's snippets run offline as they stand there and print what the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import ROOT
from pages import same

TEXT = (ROOT / "README.md").read_text(encoding="utf8")
SNIPPET = re.compile(r"^```(sh|python)\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = [match.groups() for match in SNIPPET.finditer(TEXT)]
# Every Python process of a snippet imports this module first.
NO_NETWORK = """
import socket

def refused(self, address, *rest):
    if self.family != socket.AF_UNIX:
        raise OSError(f"a snippet of the README connects to {address}")

socket.socket.connect = socket.socket.connect_ex = refused
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a snippet: this Python and this prefixfast first, no network."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf8")
    paths = os.pathsep.join(map(str, (folder, ROOT / "python")))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    # One thread: a second one gains nothing on a base of this size and waits long on a busy machine.
    own = {"PYTHONPATH": paths, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return os.environ | own


def test_the_comparison_finds_another_word_and_another_number():
    assert same("loss 0.0907, steps 100\n", "loss 0.0908, steps 100\n")
    assert not same("loss 0.0907, steps 100\n", "loss 0.1907, steps 100\n")
    assert not same("loss 0.0907, steps 100\n", "loss 0.0907, steps 101\n")


def test_there_are_three_snippets():
    assert [kind for kind, *_ in SNIPPETS] == ["sh", "python", "python"]
    assert len(re.findall(r"^```\w", TEXT, re.MULTILINE)) == 2 * len(SNIPPETS)


@pytest.mark.parametrize(("kind", "source", "shown"), SNIPPETS, ids=["command line", "adapters", "users"])
def test_the_snippet_prints_what_the_readme_shows(kind, source, shown, offline, tmp_path):
    command = ["bash", "-eu", "-c", source] if kind == "sh" else [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(shown, done.stdout), done.stdout


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(TEXT.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / link).exists()] == []
