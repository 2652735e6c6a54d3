"""The import contracts of pyproject.toml hold, and imports that break them are found, under TYPE_CHECKING too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import ROOT

PACKAGE = ROOT / "python" / "prefixfast"
LINT = Path(sys.executable).parent / "lint-imports"
PLANTED = {
    "against the order": (
        "model/fingerprint.py",
        "from prefixfast.engine.request import Request\n",
        "imports go one way",
    ),
    "against the order, for types": (
        "model/fingerprint.py",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from prefixfast.prefix.prefix import Prefix\n",
        "imports go one way",
    ),
    "between training and engine": (
        "training/optimizer.py",
        "from prefixfast.engine.request import Request\n",
        "imports go one way",
    ),
    "a cycle within a package": (
        "store/versions.py",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from prefixfast.store.store import PrefixStore\n",
        "no import cycles",
    ),
    "a kernel called from outside attention": (
        "engine/explain.py",
        "from prefixfast_kernels.prefix_fwd import prefix_fwd\n",
        "only attention calls the kernels",
    ),
    "a kernel that knows prefixfast": (
        "../prefixfast_kernels/launch.py",
        "from prefixfast.errors import ConfigError\n",
        "the kernels know nothing of prefixfast",
    ),
}


def lint(python: Path) -> subprocess.CompletedProcess[str]:
    command = [str(LINT), "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=python, capture_output=True, text=True, check=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of both packages' sources."""
    for name in ("prefixfast", "prefixfast_kernels"):
        source = (ROOT / "python" / name).resolve()
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__"))
    return tmp_path


def test_the_contracts_hold(copied):
    done = lint(copied)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_import_is_found(planted, copied):
    path, line, contract = PLANTED[planted]
    file = copied / "prefixfast" / path
    head, mark, rest = file.read_text(encoding="utf8").partition("from __future__ import annotations\n")
    file.write_text(head + mark + line + rest, encoding="utf8")
    done = lint(copied)
    assert done.returncode != 0
    assert f"{contract} BROKEN" in done.stdout


def test_few_modules_stand_at_the_top_of_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
