"""The data that lies beside the project; tests that need it skip without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PREFIXFAST_SHARED", ROOT.parent / "shared"))


def folder(*parts: str) -> Path:
    """A folder of the shared data, or a skip."""
    path = SHARED.joinpath("data", *parts)
    if not path.exists():
        pytest.skip(f"{path} is absent (set PREFIXFAST_SHARED)")
    return path


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M as a Hugging Face folder: PREFIXFAST_SMOLLM2, or made by its script (40 s, needs the network and gguf)."""
    if given := os.environ.get("PREFIXFAST_SMOLLM2"):
        return Path(given)
    script = folder("lm", "smollm2-135m") / "get.py"
    pytest.importorskip("gguf", reason="get.py needs gguf (or set PREFIXFAST_SMOLLM2 to the folder)")
    out = cache / "smollm2"
    if not out.exists():
        subprocess.run([sys.executable, str(script), str(out), "float32"], check=True)
    return out
