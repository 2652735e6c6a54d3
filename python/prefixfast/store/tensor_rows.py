"""Rows of a safetensors file whose tensors each have the same number of rows for every prefix."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefixfast.errors import DataError

HEADER = 8  # bytes of the header's length


def select_rows(data: bytes, count: int, keep: Sequence[int]) -> bytes:
    """A safetensors file with the rows of some prefixes only, without reading the numbers.

    Args:
        data: Content of a safetensors file whose tensors have the shape ``[count * r, ...]``; r can differ.
        count: Number of prefixes.
        keep: Numbers of the prefixes to keep, in the order of the result.

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
        tensors = {n: dict(t) for n, t in header.items() if n != "__metadata__"}
        parts: list[memoryview] = []
        end = 0
        for tensor in sorted(tensors.values(), key=lambda t: t["data_offsets"]):
            start, stop = tensor["data_offsets"]
            rows, left = divmod(tensor["shape"][0], count)
            if left or (stop - start) % count or stop > len(body):
                raise ValueError(tensor["shape"])
            step = (stop - start) // count
            parts += [body[start + i * step : start + (i + 1) * step] for i in keep]
            tensor["shape"] = [rows * len(keep), *tensor["shape"][1:]]
            tensor["data_offsets"] = [end, end + step * len(keep)]
            end += step * len(keep)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        msg = f"expected tensors with rows for each of {count} prefixes, got {e}; the checkpoint is damaged"
        raise DataError(msg) from e
    new = json.dumps(tensors, separators=(",", ":")).encode()
    new += b" " * (-len(new) % 8)
    return b"".join([len(new).to_bytes(HEADER, "little"), new, *parts])
