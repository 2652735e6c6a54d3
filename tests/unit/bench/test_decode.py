"""Suite ``decode``: contenders agree, the results file is written, a wrong contender stops the suite."""

import json

import pytest
import torch

from prefixfast.attention import ops
from prefixfast.bench import decode
from prefixfast.bench.decode_inputs import Inputs, Shape
from prefixfast.bench.harness import WrongResultError
from prefixfast_kernels.testing.decode_cases import MODES
from prefixfast_kernels.testing.tolerance import relative_error

SMALL = Shape("small", 6, 5, 16, 2, (4, 2, 16))


def test_the_results_file_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "CPU_SHAPES", (SMALL,))
    decode.run(tmp_path, dtype="auto", rounds=2, device="cpu")
    first, command, *rows = (json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines())
    assert first["environment"]["cores"]
    assert command["suite"] == "decode"
    assert [r["contender"] for r in rows] == ["prefixfast", "torch backend", "gather, SDPA", "SDPA on copies"]
    assert "| small | prefixfast (called) |" in capsys.readouterr().out


def test_a_wrong_contender_stops_the_suite(monkeypatch):
    monkeypatch.setattr(Inputs, "sdpa", lambda self, k, v: self.ours("torch", "chosen") * 1.01)
    with pytest.raises(WrongResultError, match="nothing is timed"):
        decode.measure(SMALL, torch.float32, torch.device("cpu"), rounds=1, bandwidth=1.0)


def test_the_modes_agree_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    choose = ops.choose_backend
    monkeypatch.setattr(ops, "choose_backend", lambda _, *rest: choose("triton", *rest))
    x = Inputs.make(SMALL, torch.float32, torch.device("cpu"))
    expected = x.sdpa(*x.copied())
    assert all(relative_error(x.ours("triton", mode), expected) < 1e-5 for mode in MODES)
