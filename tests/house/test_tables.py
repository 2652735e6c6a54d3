"""The tables in README.md and docs/ are those that docs/tables.py makes of the results files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import ROOT

SCRIPT = ROOT / "docs" / "tables.py"


def tables(root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--root", str(root), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The pages and results of this repository."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benches" / "results", tmp_path / "benches" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_the_tables_are_up_to_date():
    done = tables(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_result_is_found_and_written(copy):
    path = copy / "benches" / "results" / "tiering.jsonl"
    lines = path.read_text(encoding="utf8").splitlines()
    lines[-1] = json.dumps({"p99_ratio": 3.21})
    path.write_text("\n".join(lines), encoding="utf8")
    checked = tables(copy, "--check")
    assert checked.returncode == 1
    assert "docs/performance.md: tiering" in checked.stdout
    assert tables(copy).returncode == 0
    assert "3.21" in (copy / "docs" / "performance.md").read_text(encoding="utf8")
    assert tables(copy, "--check").returncode == 0


def test_times_of_unequal_training_and_rates_without_a_cache_are_not_shown(copy):
    results = copy / "benches" / "results"
    good = (results / "generate-gpt2-fp32.jsonl").read_text(encoding="utf8")
    lines = good.splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"settings": {"use_cache": False}})
    (results / "generate-gpt2-fp32.jsonl").write_text("\n".join(lines), encoding="utf8")
    assert "ran without a KV cache" in tables(copy, "--check").stderr
    (results / "generate-gpt2-fp32.jsonl").write_text(good, encoding="utf8")
    path = results / "quality-smollm2-time-peft-2.json"
    record = json.loads(path.read_text(encoding="utf8"))
    record["losses"][7] *= 1.01
    path.write_text(json.dumps(record), encoding="utf8")
    assert "quality-smollm2-time-peft-2.json: its losses differ by 1.0e-02" in tables(copy, "--check").stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- table: tiering -->", "<!-- table: tyering -->", "unknown table"),
        ("<!-- table: tiering -->", "", "no page shows the tables tiering"),
        ("<!-- table: tiering -->", "<!-- table: tiering -->\n<!-- table: tiering -->", "has no <!-- end -->"),
    ],
)
def test_wrong_markers_are_refused(copy, old, new, message):
    page = copy / "docs" / "performance.md"
    page.write_text(page.read_text(encoding="utf8").replace(old, new), encoding="utf8")
    done = tables(copy, "--check")
    assert done.returncode != 0
    assert message in done.stderr
