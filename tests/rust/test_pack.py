"""`pack` against a slow reference implementation, and hostile input."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from oracles import int32
from prefixfast._rust import pack
from prefixfast.errors import ConfigError, DataError


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2)), max_size=40),
    st.integers(1, 100),
    st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_pack(examples: list[tuple[int, int, int]], budget: int, sequence_sum: bool) -> None:
    lengths = [n for n, _, _ in examples]
    targets = [min(n, t) for n, t, _ in examples]
    batch = np.cumsum([jump // 2 for *_, jump in examples]).tolist()
    found = pack(int32(lengths), int32(targets), int32(batch), token_budget=budget, sequence_sum=sequence_sum)
    micros, weight = oracles.pack(lengths, targets, batch, budget, sequence_sum)
    assert [found.order[a:b].tolist() for a, b in itertools.pairwise(found.micro_indptr)] == micros
    assert found.weight.tolist() == weight
    assert (found.order.dtype, found.micro_indptr.dtype, found.weight.dtype) == (np.int32, np.int32, np.float64)
    assert found.order is found.order


def test_pack_refuses() -> None:
    one = int32([1])
    for lengths, targets, batch in [
        ([1, 2], [1], [0]),
        ([0], [0], [0]),
        ([-5], [0], [0]),
        ([2], [3], [0]),
        ([2], [-1], [0]),
        ([1, 1], [1, 1], [1, 0]),
    ]:
        with pytest.raises(ConfigError):
            pack(int32(lengths), int32(targets), int32(batch), token_budget=4, sequence_sum=False)
    for budget in (0, -1):
        with pytest.raises(ConfigError, match="token_budget"):
            pack(one, one, one, token_budget=budget, sequence_sum=False)
    with pytest.raises(OverflowError):
        pack(one, one, one, token_budget=2**70, sequence_sum=False)
    with pytest.raises(DataError, match=r"batch 7 \(examples 1 to 2\) has no target"):
        pack(int32([1, 1, 1]), int32([1, 0, 0]), int32([3, 7, 7]), token_budget=4, sequence_sum=True)
    with pytest.raises(ConfigError, match="contiguous"):
        pack(int32([1, 1])[::-1], int32([1, 1]), int32([0, 0]), token_budget=4, sequence_sum=True)
    for wrong in (one.astype(np.int64), one.astype(np.float32), one.reshape(1, 1), [1], None):
        with pytest.raises(TypeError):
            pack(one, wrong, one, token_budget=4, sequence_sum=True)
    huge = int32([2**31 - 1] * 3)
    assert pack(huge, huge, int32([0, 0, 1]), token_budget=2**62, sequence_sum=False).order.tolist() == [0, 1, 2]
