"""Paths of the data folder beside the repository; tests that need it are skipped without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PREFIXFAST_SHARED", ROOT.parent / "shared"))


def folder(*parts: str) -> Path:
    """A folder of the shared data; skips the test if it does not exist."""
    path = SHARED.joinpath("data", *parts)
    if not path.exists():
        pytest.skip(f"{path} is absent (set PREFIXFAST_SHARED)")
    return path


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M as a Hugging Face folder.

    The folder is PREFIXFAST_SMOLLM2, or the output of a script (40 s, needs the network and gguf).
    """
    if given := os.environ.get("PREFIXFAST_SMOLLM2"):
        return Path(given)
    script = folder("lm", "smollm2-135m") / "get.py"
    pytest.importorskip("gguf", reason="get.py needs gguf (or set PREFIXFAST_SMOLLM2 to the folder)")
    out = cache / "smollm2"
    if not out.exists():
        subprocess.run([sys.executable, str(script), str(out), "float32"], check=True)
    return out
