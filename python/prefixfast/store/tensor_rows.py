"""Rows of some prefixes in tensors that hold rows of several ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from prefixfast.errors import DataError

HEADER = 8  # bytes of the header's length
OWNERS = "owners"  # key of a checkpoint's state
Owners = Mapping[str, Sequence[int]]  # numbers of the prefixes that have rows, ascending, by the name of the tensor


class KeptRows(NamedTuple):
    """Rows of a tensor that are kept.

    Attributes:
        name: Name of the tensor in the result.
        num_prefixes: Number of prefixes that have rows in it.
        keep: Numbers of the kept ones among these, in the order of the result.
        owners: Numbers of the kept ones in the result.
    """

    name: str
    num_prefixes: int
    keep: list[int]
    owners: list[int]


def kept_rows(names: Iterable[str], count: int, keep: Sequence[int], owners: Owners) -> dict[str, KeptRows]:
    """Rows of some prefixes in each tensor. Numbered tensors (``x.0``, ``x.2``) are numbered without gaps.

    Args:
        names: Names of the tensors.
        count: Number of prefixes.
        keep: Numbers of the prefixes to keep, in the order of the result.
        owners: Prefixes with rows, of the tensors that do not have rows of all of them.

    Returns:
        Kept rows by name. Tensors with ``owners`` none of which is kept are left out.

    Example:
        >>> kept_rows(["x.0", "x.1"], 3, [2, 1], {"x.0": [0], "x.1": [1, 2]})
        {'x.1': KeptRows(name='x.0', num_prefixes=2, keep=[1, 0], owners=[0, 1])}
    """
    found: dict[str, KeptRows] = {}
    numbers: dict[str, int] = {}
    for name in sorted(names, key=_by_number):
        own = owners.get(name, range(count))
        held = [i for i in keep if i in own]
        if name in owners and not held:
            continue
        kind, dot, number = name.rpartition(".")
        new = name
        if dot and number.isdecimal():
            new = f"{kind}.{numbers.get(kind, 0)}"
            numbers[kind] = numbers.get(kind, 0) + 1
        found[name] = KeptRows(new, len(own), [own.index(i) for i in held], [keep.index(i) for i in held])
    return found


def kept_owners(count: int, keep: Sequence[int], owners: Owners) -> dict[str, list[int]]:
    """Prefixes with rows in each tensor of the result of `kept_rows`, of the tensors that lack a prefix."""
    kept = kept_rows(owners, count, keep, owners).values()
    return {rows.name: rows.owners for rows in kept if len(rows.owners) < len(keep)}


def select_rows(data: bytes, count: int, keep: Sequence[int], owners: Owners = MappingProxyType({})) -> bytes:
    """A safetensors file with the rows of some prefixes only, without reading the numbers.

    Args:
        data: Content of a safetensors file whose tensors have the shape ``[m * r, ...]``; m is the number of prefixes
            with rows, r can differ.
        count: Number of prefixes.
        keep: Numbers of the prefixes to keep, in the order of the result.
        owners: Prefixes with rows, of the tensors that do not have rows of all of them.

    Raises:
        DataError: If the content is damaged, or a tensor has another number of rows.

    Example:
        >>> import torch
        >>> from safetensors.torch import load, save
        >>> data = save({"x": torch.arange(6).view(6, 1), "y": torch.tensor([1.0, 2.0, 3.0])})
        >>> {n: t.flatten().tolist() for n, t in load(select_rows(data, 3, [2, 0])).items()}
        {'x': [4, 5, 0, 1], 'y': [3.0, 1.0]}
    """
    size = int.from_bytes(data[:HEADER], "little")
    body = memoryview(data)[HEADER + size :]
    try:
        header = json.loads(data[HEADER : HEADER + size])
        whole = {n: dict(t) for n, t in header.items() if n != "__metadata__"}
        kept = kept_rows(whole, count, keep, owners)
        tensors = {}
        parts: list[memoryview] = []
        end = 0
        for name in sorted(kept, key=lambda n: whole[n]["data_offsets"]):
            tensor, rows = whole[name], kept[name]
            start, stop = tensor["data_offsets"]
            each, left = divmod(tensor["shape"][0], rows.num_prefixes)
            if left or (stop - start) % rows.num_prefixes or stop > len(body):
                raise ValueError(tensor["shape"])
            step = (stop - start) // rows.num_prefixes
            parts += [body[start + i * step : start + (i + 1) * step] for i in rows.keep]
            tensor["shape"] = [each * len(rows.keep), *tensor["shape"][1:]]
            tensor["data_offsets"] = [end, end + step * len(rows.keep)]
            end += step * len(rows.keep)
            tensors[rows.name] = tensor
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, ZeroDivisionError) as e:
        msg = f"expected tensors with rows for each of {count} prefixes, got {e}; the checkpoint is damaged"
        raise DataError(msg) from e
    new = json.dumps(tensors, separators=(",", ":")).encode()
    new += b" " * (-len(new) % 8)
    return b"".join([len(new).to_bytes(HEADER, "little"), new, *parts])


def _by_number(name: str) -> tuple[str, int]:
    """Order of the names of tensors, in which ``x.10`` follows ``x.9``."""
    kind, _, number = name.rpartition(".")
    return (kind, int(number)) if number.isdecimal() else (name, -1)
