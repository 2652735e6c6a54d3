"""Processes that end while threads run models: no signal, no hang, and the exit code of the script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def statuses(folder: Path, rounds: int, seed: int, *names: str) -> dict[str, list[int]]:
    command = [sys.executable, ROOT / "tests" / "exits.py", folder, str(rounds), str(seed), *names]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, list[int]]) -> None:
    assert {name: set(codes) for name, codes in found.items()} == {
        name: {int(name in ("uncaught", "sys_exit"))} for name in found
    }


@pytest.mark.timeout(600)
def test_scripts_that_end_while_threads_run_models(tmp_path):
    check(statuses(tmp_path, 1, 0, "submitted", "uncaught", "batch_in_a_thread", "training_in_a_thread", "loads"))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_hundred_scripts_that_end_at_random_moments(tmp_path):
    found = statuses(tmp_path, 17, 7)
    check(found)
    assert sum(map(len, found.values())) >= 200
