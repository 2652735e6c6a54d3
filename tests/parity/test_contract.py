"""A packed forward of every family on the oldest supported and on the installed version of transformers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import shared

OLDEST = re.search(r"transformers>=([\d.]+)", (shared.ROOT / "pyproject.toml").read_text())[1]


@pytest.mark.parametrize("version", ["installed", pytest.param("oldest", marks=pytest.mark.long)])
def test_every_family_runs(version, tmp_path):
    path = [str(shared.ROOT / "python"), str(shared.ROOT / "tests")]
    wanted = transformers.__version__
    if version == "oldest":
        wanted = f"{OLDEST}.0"
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path), f"transformers=={wanted}"]
        if subprocess.run(command, check=False).returncode:
            pytest.skip("the oldest transformers cannot be installed here (no network?)")
        path.insert(0, str(tmp_path))
    script = Path(__file__).parent / "contract.py"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), wanted], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 10
