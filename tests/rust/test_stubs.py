"""The hand-written stub is the truth about the extension."""

import os
import subprocess
import sys
from pathlib import Path

from oracles import ROOT


def test_stubtest_finds_nothing(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"
    # Names and parameters are what is compared: reading torch's types for them takes minutes.
    config.write_text(
        f"[mypy]\nmypy_path = {ROOT / 'python'}\nexplicit_package_bases = true\nfollow_imports = skip\n",
        encoding="utf-8",
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}

    def python(*arguments: str) -> str:
        run = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    # stubtest passes in silence a private module that it cannot import.
    python("-c", "import prefixfast._rust")
    assert "no issues found in 1 module" in python(
        "-m", "mypy.stubtest", "prefixfast._rust", "--mypy-config-file", str(config)
    )
