"""Rows of some prefixes of a safetensors file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from prefixfast.errors import DataError
from prefixfast.store.tensor_rows import select_rows

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
