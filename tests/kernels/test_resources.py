"""What ships compiles for every chip without spills, within its shared memory, onto tensor cores: no GPU is needed to know."""

import os
import subprocess
import sys

import pytest

from oracles import ROOT
from prefixfast_kernels.testing.compile_report import CHIPS, Report, cases, faults

pytest.importorskip("triton")


def compiled(*args: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """Runs in a process of its own: here the kernels belong to the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (first, str(ROOT / "kernels"))))
    return subprocess.run(
        [sys.executable, "-m", "prefixfast_kernels.testing.compile_report", *args],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_kernels_of_a_hopper_chip_are_sound():
    run = compiled("sm90", "--quick")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| sm90 |") == len(list(cases(["sm90"], quick=True))) == 22


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", CHIPS)
def test_all_kernels_of_every_chip_are_sound(chip):
    run = compiled(chip)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"| {chip} |") == len(list(cases([chip]))) > 200


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", CHIPS)
def test_the_oldest_triton_compiles_them_as_well(chip, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "triton==3.6.0"],
        check=True,
    )
    run = compiled(chip, first=str(tmp_path))
    assert "Triton 3.6.0" in run.stdout
    assert run.returncode == 0, run.stderr


GOOD = Report(registers=200, spilled=0, shared=98304, mma=48, wgmma=48, copies=64)


@pytest.mark.parametrize("change", [{"spilled": 4}, {"shared": 300000}, {"mma": 0}, {"wgmma": 0}, {"copies": 0}])
def test_the_gate_can_fail(change):
    case = ("prefix_fwd", "sm90", 128, "bf16", "plain")
    assert not faults(GOOD, *case)
    assert len(faults(Report(**{**vars(GOOD), **change}), *case)) == 1
