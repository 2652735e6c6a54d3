"""The pages of docs/first-hour, run from the built wheel in an environment of their own, print what they show."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import ROOT
from prefixfast.io.environment import environment
from walks import same, steps, walk

PAGES = sorted((ROOT / "docs" / "first-hour").glob("*.md"))
RESULTS = ROOT / "benches" / "results" / "first-hour.jsonl"
NO_NETWORK = """
import socket

def refused(self, address, *rest):
    if self.family != socket.AF_UNIX:
        raise OSError(f"a first hour connects to {address}")

socket.socket.connect = socket.socket.connect_ex = refused
"""


def run(*command: object, **how: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a new environment with the wheel; its other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("new")
    maturin = Path(sys.executable).parent / "maturin"
    dist = folder / "dist"
    run(maturin, "build", "--release", "--quiet", "--offline", "-i", sys.executable, "--out", dist, cwd=ROOT)
    run(sys.executable, "-m", "venv", folder / "env")
    python = folder / "env" / "bin" / "python"
    own = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *dist.iterdir())
    (own / "others.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    (own / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables = kept | {
        "PATH": os.pathsep.join((str(python.parent), os.environ["PATH"])),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "COLUMNS": "80",
        "OMP_NUM_THREADS": "1",
    }
    place = run(python, "-c", "import prefixfast; print(prefixfast.__file__)", env=variables, cwd=folder)
    assert Path(place.strip()).is_relative_to(own)
    return variables


def test_the_comparison_finds_another_word_and_another_number():
    assert same("a 0.50 b ... c\n", "a 0.51 b and c\n")
    assert same("a\n...\nc\n", "a\nb\nb\nc\n")
    assert same("a\n...\nc\n", "a\nc\n")
    assert same("a\nc\n", "a\ntrain: 9 of 10 steps, 1.5 s left\nc\n")
    assert not same("a ...\nc\n", "a b\nd\nc\n")
    assert not same("a 0.50 b\n", "a 0.60 b\n")
    assert not same("a 0.50 b\n", "a 0.50 c\n")
    assert not same("a ... c\n", "a b\n")


def test_there_are_five_walks_and_the_first_takes_six_commands_at_most():
    assert len(PAGES) == 5
    commands = [c for c, _ in steps(ROOT / "docs" / "first-hour" / "data-scientist.md") if "prefixfast" in c]
    assert 0 < len(commands) <= 6


@pytest.fixture(scope="module")
def files(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a user has before the first command."""
    folder = tmp_path_factory.mktemp("files")
    run("python", ROOT / "docs" / "first-hour" / "make_files.py", folder, env=env)
    return folder


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_walk_prints_what_its_page_shows(page, env, files, tmp_path):
    shutil.copytree(files, tmp_path, symlinks=True, dirs_exist_ok=True)
    done = list(walk(page, tmp_path, env))
    if os.environ.get("PREFIXFAST_WRITE_WALKS"):
        with RESULTS.open("a", encoding="utf-8") as file:
            if not RESULTS.stat().st_size:
                file.write(json.dumps({"environment": environment() | {"threads": 1}}) + "\n")
            for step in done:
                line = {"walk": page.stem, "command": step.command, "seconds": round(step.seconds, 1)}
                file.write(json.dumps(line) + "\n")
    wrong = [f"$ {s.command}\nexpected\n{s.expected}got\n{s.output}" for s in done if not s.is_right]
    assert not wrong, "\n".join(wrong)
