"""Token ids that a user gives: what counts as a list of them, and the error of everything else."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch

import tiny
from prefixfast import ConfigError, Prefix, RequestError, generate, load, score
from prefixfast.data.encode import token_ids

GOOD = {
    "a list": [5, 6],
    "a tuple": (5, 6),
    "a range": range(5, 7),
    "a numpy array": np.array([5, 6]),
    "a numpy array of bytes": np.array([5, 6], np.uint8),
    "numpy numbers": [np.int64(5), np.int32(6)],
    "numpy arrays without dimensions": [np.array(5), np.array(6)],
    "torch numbers": list(torch.tensor([5, 6])),
}
BAD = {
    "a number": 5,
    "an array without dimensions": np.array(5),
    "a string": "56",
    "bytes": b"56",
    "None": None,
    "a set": {5, 6},
    "a mapping": {5: 6},
    "fractions": [5.0, 6.0],
    "booleans": [True, False],
    "a boolean among integers": [5, True],
    "nested": [[5, 6]],
    "ragged": [[5, 6], [7]],
    "negative": [-1],
    "beyond the vocabulary": [tiny.VOCAB],
    "beyond 64 bits": [2**70],
    "unsigned beyond 63 bits": np.array([2**63 + 1], np.uint64),
    "strings": ["5", "6"],
    "a deque of lists": deque([[5]]),
}


@pytest.fixture(scope="module")
def base():
    with load(tiny.make("gpt2")) as model:
        yield model


@pytest.mark.parametrize("value", GOOD.values(), ids=GOOD)
def test_flat_sequences_of_integers_are_token_ids(value):
    found = token_ids(value, tiny.VOCAB)
    assert (found.dtype, found.tolist()) == (np.int32, [5, 6])


@pytest.mark.parametrize("value", [[], (), np.zeros(0, np.int64)], ids=["list", "tuple", "array"])
def test_an_empty_sequence_is_no_error_here(value):
    assert token_ids(value, tiny.VOCAB).tolist() == []


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_everything_else_is_not(value):
    assert token_ids(value, tiny.VOCAB) is None


@pytest.mark.parametrize("name", [n for n in GOOD if n != "a numpy array"])
def test_prompts_take_them(name, base):
    expected = generate([[5, 6]], model=base, max_new_tokens=3)[0].token_ids
    assert generate([GOOD[name]], model=base, max_new_tokens=3)[0].token_ids == expected


@pytest.mark.parametrize("value", [v for v in BAD.values() if not isinstance(v, str | dict | int)], ids=str)
def test_a_wrong_prompt_fails_alone(value, base):
    with pytest.raises(RequestError, match="request 1: expected a string, a list of token ids"):
        generate([[5], value], model=base, max_new_tokens=3)
    good, bad, row = generate([[5], value, {"input_ids": value}], model=base, max_new_tokens=3, on_error="return")
    assert (good.error, good.finish_reason) == (None, "length")
    assert bad.error.startswith("RequestError: request 1")
    assert row.error.startswith("RequestError: request 2")


@pytest.mark.parametrize("value", [v for v in BAD.values() if not isinstance(v, str)], ids=str)
def test_a_wrong_target_is_a_request_error(value, base):
    with pytest.raises(RequestError, match="request 0: target"):
        score([[5]], targets=[value], model=base)


@pytest.mark.parametrize("value", [v for v in BAD.values() if not isinstance(v, str)], ids=str)
def test_a_wrong_text_is_a_config_error(value, base):
    with pytest.raises(ConfigError, match="text: expected a string, token ids"):
        Prefix.from_text(base, value)


@pytest.mark.parametrize("value", [v for v in BAD.values() if not isinstance(v, str | dict)], ids=str)
def test_inspect_names_the_wrong_prompt(value, base):
    prefix = Prefix.from_text(base, [5, 6, 7])
    with pytest.raises(RequestError, match="prompt 1: expected a string, a list of token ids"):
        prefix.inspect(base, [[5, 6], value], words=0)
