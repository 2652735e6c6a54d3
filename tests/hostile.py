"""Values that no argument expects, for tests that give each of them to each argument of the public calls."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch


class NoRepr:
    """An object whose representation fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


# The values of the default suite; the others are of the same kinds.
FEW: list[Any] = [
    10**400,
    -(10**400),
    2**63,
    -1,
    1e39,
    1e-45,
    float("nan"),
    float("-inf"),
    True,
    np.int64(3),
    np.float32(np.inf),
    np.array([1, 2]),
    torch.tensor([1, 2]),
    "x",
    "\ud800",
    None,
    Decimal("1.5"),
    [[10**400]],
    {"a": 1},
]
ALL: list[Any] = [
    *FEW,
    10**5000,
    2**31,
    2**32,
    2**64,
    -(2**63),
    0,
    -0.0,
    0.5,
    1e308,
    -1e39,
    1e-320,
    float("inf"),
    False,
    np.int8(-1),
    np.float64(0.7),
    np.float16(0.5),
    np.bool_(True),
    np.uint64(2**64 - 1),
    np.array(3),
    np.array([]),
    torch.tensor(3),
    torch.tensor(0.5),
    torch.tensor(True),
    "",
    "3",
    "auto",
    "\0",
    "a" * 300,
    "[red]{0}%s\n",
    b"x",
    Decimal("NaN"),
    Fraction(1, 3),
    Fraction(10**400),
    3 + 4j,
    [],
    [1],
    ["x"],
    [[1]],
    [[]],
    [[-1]],
    [[True]],
    ["\ud800"],
    [None],
    (),
    {},
    {1},
    object,
    NoRepr(),
    NoRepr,
    range(3),
    Path("x"),
]


def name_of(value: Any) -> str:
    """A short name of a value for the report of a test."""
    try:
        return repr(value)[:40]
    except (RuntimeError, ValueError):
        return type(value).__name__
