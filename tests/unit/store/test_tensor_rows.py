"""Rows of some prefixes of a safetensors file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from prefixfast.errors import DataError
from prefixfast.store.tensor_rows import kept_owners, select_rows

TENSORS = {
    "two rows": torch.arange(24, dtype=torch.float32).view(6, 2, 2),
    "one row": torch.arange(6, dtype=torch.float64).view(3, 2),
    "flag": torch.tensor([True, False, True]),
    "empty": torch.empty(3, 0),
    "half": torch.arange(3).to(torch.bfloat16),
}


@pytest.mark.parametrize("keep", [[0, 1, 2], [1], [2, 0], []])
def test_rows_are_those_of_the_prefixes(keep):
    found = load(select_rows(save(TENSORS), 3, keep))
    for name, tensor in TENSORS.items():
        expected = tensor.unflatten(0, (3, -1))[keep].flatten(0, 1)
        assert torch.equal(found[name], expected)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("keep", "expected", "owners"),
    [
        ([0, 2], {"x.0": [0, 1], "x.1": [3, 4]}, {"x.0": [0], "x.1": [1]}),
        ([2, 1], {"x.0": [3, 4, 2, 9]}, {}),
        ([0], {"x.0": [0, 1]}, {}),
    ],
)
def test_tensors_of_some_prefixes_are_numbered_again(keep, expected, owners):
    held = {"x.0": [0], "x.1": [1, 2]}
    tensors = {"x.0": torch.tensor([0, 1]), "x.1": torch.tensor([2, 9, 3, 4]), "y": torch.arange(3)}
    found = load(select_rows(save(tensors), 3, keep, held))
    assert found.pop("y").tolist() == keep
    assert {name: t.tolist() for name, t in found.items()} == expected
    assert kept_owners(3, keep, held) == owners


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (save(TENSORS), 4),
        (save(TENSORS)[:-30], 3),
        (save({"scalar": torch.tensor(1.0)}), 3),
        (b"", 3),
        (b"\x05\0\0\0\0\0\0\0nulls", 3),
        (b"\x04\0\0\0\0\0\0\0null", 3),
    ],
)
def test_other_files_are_refused(data, count):
    with pytest.raises(DataError, match="damaged"):
        select_rows(data, count, [0])
