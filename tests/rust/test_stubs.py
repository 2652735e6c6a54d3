"""The hand-written stub has the names and parameters of the extension."""

import os
import subprocess
import sys
from pathlib import Path

from oracles import ROOT


def test_the_stub_matches_the_extension(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"
    # Only names and parameters are compared. Reading torch's types for them would take minutes.
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

    # stubtest does not report a private module that it cannot import.
    python("-c", "import prefixfast._rust")
    assert "no issues found in 1 module" in python(
        "-m", "mypy.stubtest", "prefixfast._rust", "--mypy-config-file", str(config)
    )
