"""The wheel: what is in it, and that it works away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from oracles import ROOT

pytestmark = pytest.mark.wheel
MATURIN = Path(sys.executable).parent / "maturin"


def run(*command: object, **how: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(
        MATURIN,
        "build",
        "--release",
        "--quiet",
        "--offline",
        "--interpreter",
        sys.executable,
        "--out",
        folder,
        cwd=ROOT,
    )
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as z:
        return set(z.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("target")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        target,
        wheel,
    )
    return target


def test_the_wheel_is_for_every_python_from_3_11(wheel):
    assert "-cp311-abi3-" in wheel.name


def test_the_wheel_holds_the_sources_of_both_packages_and_no_others(names):
    python = {p.relative_to(ROOT / "python").as_posix() for p in (ROOT / "python" / "prefixfast").rglob("*.py")}
    kernels = {
        p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels" / "prefixfast_kernels").rglob("*.py")
    }
    assert {n for n in names if n.endswith(".py")} == python | kernels


@pytest.mark.parametrize("name", ["_rust.abi3.so", "_rust.pyi", "py.typed"])
def test_the_wheel_holds_the_extension_and_its_types(names, name):
    assert f"prefixfast/{name}" in names


def test_the_wheel_holds_nothing_else(names):
    ends = (".py", ".pyi", ".so", "py.typed")
    assert [
        n
        for n in names
        if not n.endswith(ends) and ".dist-info/" not in n and "/demo/base" not in n and "/training/recipes/" not in n
    ] == []
    recipes = {p.name for p in (ROOT / "python" / "prefixfast" / "training" / "recipes").iterdir()}
    assert {n.rsplit("/", 1)[1] for n in names if "/training/recipes/" in n} == recipes
    assert "prefixfast/demo/base/model.safetensors" in names
    assert "prefixfast/demo/base_seq2seq/model.safetensors" in names


def test_the_wheel_has_its_command(wheel):
    with zipfile.ZipFile(wheel) as z:
        (entry,) = [n for n in z.namelist() if n.endswith("entry_points.txt")]
        assert "prefixfast=prefixfast.cli:main" in z.read(entry).decode().replace(" ", "")


PROGRAM = """
import sys
from pathlib import Path
import prefixfast, prefixfast_kernels
from prefixfast import _rust
target, repository = Path(sys.argv[1]), sys.argv[2]
for module in (prefixfast, prefixfast_kernels, _rust):
    assert Path(module.__file__).is_relative_to(target), module.__file__
for name in prefixfast.__all__:
    assert getattr(prefixfast, name) is not None, name
import torch
from transformers import GPT2Config, GPT2LMHeadModel
sizes = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
kv = {f"self.{i}.{x}": torch.randn(3, 2, 8) for i in range(2) for x in "kv"}
prefix = prefixfast.Prefix(kv, pos_start=3)
prefix.save_pretrained("p")
prefix = prefixfast.Prefix.from_pretrained("p")
results = prefixfast.generate([[3, 4, 5], [6]], [prefix, None], model=model, max_new_tokens=4, max_num_seqs=2)
assert [1 <= len(r.token_ids) <= 4 for r in results] == [True, True]
files = [str(getattr(m, "__file__", None)) for m in list(sys.modules.values())]
used = [f for f in files if f.startswith(repository + "/") and "/.venv/" not in f]
assert not used, used
print("generated")
"""


def test_the_wheel_works_away_from_the_repository(installed, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONPATH": str(installed),
        "HF_HUB_OFFLINE": "1",
    }
    assert run(sys.executable, "-c", PROGRAM, installed, ROOT, cwd=tmp_path, env=env).endswith("generated\n")
