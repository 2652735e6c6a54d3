"""One prefix out of several that a request would compose, where there is one that does exactly the same.

A composed request sees all rows of its prefixes, from left to right, and its text starts at the largest ``pos_start``. Keys are stored with their positions
in them, so rows side by side under that ``pos_start`` are the same attention; sliding windows count rows, and those stay in place too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefixfast.errors import BaseMismatchError, ConfigError
from prefixfast.model.fingerprint import check_base
from prefixfast.prefix.record import PrefixData


def concatenated(parts: Sequence[PrefixData]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and fields of the prefix that equals ``parts`` composed from left to right.

    Raises:
        BaseMismatchError: For prefixes of different bases, or of different heads or head dims.
        ConfigError: If no single prefix does the same.
    """
    _check(parts)
    first = parts[0]
    bases = [p.base for p in parts if p.base is not None]
    base = max(bases, key=lambda b: sum(v is not None for v in b.values()), default=None)  # the one that says most
    decoding: dict[str, Any] = {}
    for p in parts:
        decoding |= p.decoding
    kv = {name: torch.cat([p.kv[name].to(t.device) for p in parts]) for name, t in first.kv.items()}
    fields: dict[str, Any] = {
        "pos_start": max(p.pos_start for p in parts),
        "window": first.window,
        "base": base,
        "task": next((p.task for p in reversed(parts) if p.task is not None), None),
        "decoding": decoding,
        "training": {"concatenated_from": [p.digest for p in parts], "num_trained": sum(p.num_trained for p in parts)},
    }
    return kv, fields


def _check(parts: Sequence[PrefixData]) -> None:
    first = parts[0]
    for number, other in enumerate(parts[1:], 1):
        for before, earlier in enumerate(parts[:number]):
            if earlier.base is not None and other.base is not None:
                check_base(dict(earlier.base), dict(other.base), f"concat: prefix {before}")
        if any(first.shapes[n][1:] != shape[1:] for n, shape in other.shapes.items() if n in first.shapes):
            msg = f"concat: prefix {number} has other heads than prefix 0; prefixes of one base have the same"
            raise BaseMismatchError(msg)
        reasons = {
            f"prefix {number} lies in other layers than prefix 0": first.shapes.keys() != other.shapes.keys(),
            f"window is {other.window!r} in prefix {number} and {first.window!r} in prefix 0, and a prefix has one": other.window
            != first.window,
            f"prefix {number} has numbers of another dtype than prefix 0, and converting them would change them": any(
                n in other.kv and other.kv[n].dtype != t.dtype for n, t in first.kv.items()
            ),
            f"prefix {number} was there before, and a request cannot compose a prefix with itself": any(
                p.digest == other.digest for p in parts[:number]
            ),
        }
        if reason := next((text for text, holds in reasons.items() if holds), None):
            msg = f"concat: no single prefix does the same: {reason}; give them to a request as a sequence"
            raise ConfigError(msg)
    for number, p in enumerate(parts):
        if len({s[0] for s in p.shapes.values()}) != 1:
            msg = f"concat: no single prefix does the same: layers of prefix {number} differ in length"
            raise ConfigError(msg)
