"""Tensors are written to files from where they are."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

from prefixfast import TunedWeights
from prefixfast.io.tensors import write_tensors
from prefixfast.model.memory import peak_memory, reset_peak_memory
from prefixfast.training.checkpoint import Checkpoint

CPU = torch.device("cpu")
SIZE = 16 * 2**20  # numbers of fp32


def test_every_tensor_is_read_again(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    given = {
        "whole": whole,
        "the same": whole,
        "a part": whole[1:3],
        "turned": whole.T,
        "bf16": whole.bfloat16(),
        "flags": whole > 3,
        "a number": torch.tensor(2.5, dtype=torch.float64, requires_grad=True),
        "nothing": torch.empty(0, 3),
    }
    write_tensors(tmp_path / "t", given)
    found = load_file(tmp_path / "t")
    assert set(found) == set(given)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in given.items())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is reset on Linux")
def test_a_checkpoint_and_weights_need_no_second_copy_in_memory(tmp_path):
    tensors = {name: torch.zeros(SIZE // 2) for name in ("a", "b")}
    weights = TunedWeights(tensors, "full")
    assert weights.digest
    checkpoint = Checkpoint({}, {"step": 1}, tensors)
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    checkpoint.write(tmp_path / "c")
    weights.save_pretrained(tmp_path / "w")
    assert peak_memory(CPU) - before < SIZE  # a quarter of the bytes
    assert Checkpoint.read(tmp_path / "c").tensors["b"].shape == (SIZE // 2,)
    assert (tmp_path / "w" / "tuned.safetensors").stat().st_size > 4 * SIZE
