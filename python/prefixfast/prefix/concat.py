"""Concatenation of prefixes to one that is equivalent to composing them in a request.

A composed request sees all rows of its prefixes from left to right, at each site those that the prefix has there, and
its text starts at the largest ``pos_start``.
Positions are stored in the keys, so that attention over the concatenated rows with this ``pos_start`` is the same.
Sliding windows count rows, whose places are unchanged too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefixfast.config.json_types import JSON
from prefixfast.errors import BaseMismatchError, ConfigError
from prefixfast.model.fingerprint import check_same_base
from prefixfast.prefix.names import PrefixFields, site_of
from prefixfast.prefix.record import PrefixData
from prefixfast.prefix.tensors import shared_tensors

if TYPE_CHECKING:
    from torch import Tensor


def concat_prefixes(parts: Sequence[PrefixData]) -> tuple[dict[str, Tensor], PrefixFields]:
    """Tensors and fields of the prefix that is equivalent to ``parts`` composed from left to right.

    Raises:
        BaseMismatchError: If the prefixes have different base models, heads or head dimensions.
        ConfigError: If no single prefix is equivalent.
    """
    import torch

    _check(parts)
    first = parts[0]
    bases = [p.base for p in parts if p.base is not None]
    most_complete = max(bases, key=lambda b: sum(v is not None for v in b.values()), default=None)
    decoding: dict[str, JSON] = {}
    for p in parts:
        decoding |= p.decoding
    tensors = [shared_tensors(p.kv) for p in parts]
    first_of: dict[str, Tensor] = {}
    for own in tensors:
        first_of = {**own, **first_of}
    kv = {name: torch.cat([own[name].to(t.device) for own in tensors if name in own]) for name, t in first_of.items()}
    fields: PrefixFields = {
        "pos_start": max(p.pos_start for p in parts),
        "window": first.window,
        "position": first.position,
        "base": most_complete,
        "task": next((p.task for p in reversed(parts) if p.task is not None), None),
        "decoding": decoding,
        "training": {"concatenated_from": [p.digest for p in parts], "num_trained": sum(p.num_trained for p in parts)},
    }
    return kv, fields


def _check(parts: Sequence[PrefixData]) -> None:
    """Raise the errors of `concat_prefixes`."""
    for number, other in enumerate(parts):
        for before, earlier in enumerate(parts[:number]):
            if earlier.base is not None and other.base is not None:
                check_same_base(earlier.base, other.base, f"concat: prefix {before}")
            if any(earlier.shapes[n][1:] != s[1:] for n, s in other.shapes.items() if n in earlier.shapes):
                msg = (
                    f"concat: prefix {number} has other heads than prefix {before}; prefixes of one base have the same"
                )
                raise BaseMismatchError(msg)
            if reason := _difference(earlier, other, f"prefix {before}", f"prefix {number}"):
                msg = f"concat: no single prefix does the same: {reason}; give them to a request as a sequence"
                raise ConfigError(msg)
    for number, p in enumerate(parts):
        if any(rows != p.length_at(site_of(name)) for name, (rows, _, _) in p.shapes.items()):
            msg = f"concat: no single prefix does the same: layers of prefix {number} differ in length"
            raise ConfigError(msg)


def _difference(earlier: PrefixData, other: PrefixData, before: str, name: str) -> str | None:
    """Reason why two prefixes cannot be concatenated, None if they can."""
    theirs, ours = shared_tensors(earlier.kv), shared_tensors(other.kv)
    windows = f"window is {other.window!r} in {name} and {earlier.window!r} in {before}, and a prefix has one"
    places = f"position is {other.position!r} in {name} and {earlier.position!r} in {before}, and a prefix has one"
    dtypes = f"{name} has numbers of another dtype than {before}, and converting them would change them"
    common = [site for site in other.sites if site in earlier.sites]
    reasons = {
        f"{name} lies in other layers than {before}": any(
            earlier.layers_at(site) != other.layers_at(site) for site in common
        ),
        windows: other.window != earlier.window,
        places: other.position != earlier.position,
        dtypes: any(n in ours and ours[n].dtype != t.dtype for n, t in theirs.items()),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
