"""The shipped kernels compile for every chip without spills, within its shared memory, onto tensor cores (no GPU)."""

import os
import subprocess
import sys

import pytest

from oracles import ROOT

pytest.importorskip("triton")

from prefixfast_kernels.testing.compile_report import Report, find_faults
from prefixfast_kernels.testing.shipped_kernels import Kernel, shipped_kernels
from prefixfast_kernels.tile_configs import CHIPS


def compile_report(*args: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """Run the report in a process of its own, because the kernels of this process belong to Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (first, str(ROOT / "kernels"))))
    return subprocess.run(
        [sys.executable, "-m", "prefixfast_kernels.testing.compile_report", *args],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_common_kernels_of_sm90_have_no_faults():
    run = compile_report("sm90", "--quick")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| sm90 |") == len(list(shipped_kernels(["sm90"], quick=True))) == 22


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", CHIPS)
def test_all_kernels_of_every_chip_have_no_faults(chip):
    run = compile_report(chip)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"| {chip} |") == len(list(shipped_kernels([chip]))) > 200


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", CHIPS)
def test_the_oldest_supported_triton_compiles_all_kernels(chip, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "triton==3.6.0"],
        check=True,
    )
    run = compile_report(chip, first=str(tmp_path))
    assert "Triton 3.6.0" in run.stdout
    assert run.returncode == 0, run.stderr


GOOD = Report(registers=200, spilled=0, shared=98304, mma=48, wgmma=48, copies=64)


@pytest.mark.parametrize("change", [{"spilled": 4}, {"shared": 300000}, {"mma": 0}, {"wgmma": 0}, {"copies": 0}])
def test_each_fault_is_found(change):
    kernel = Kernel("prefix_fwd", "sm90", 128, "bf16", "plain")
    assert not find_faults(GOOD, kernel)
    assert len(find_faults(Report(**{**vars(GOOD), **change}), kernel)) == 1
