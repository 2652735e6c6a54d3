"""Rows of Parquet files, which pyarrow reads."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator

from prefixfast.data.files.items import FileRow, Item, malformed
from prefixfast.data.files.raw import check_expansion
from prefixfast.errors import DataError


def short_float(value: float) -> float:
    """The number in fp64 with the fewest digits that are the same fp32 number, such as 0.1 for 0.10000000149."""
    import numpy as np  # the command line starts without it

    return float(str(np.float32(value)))


def parquet_items(raw: bytes, path: str) -> Iterator[Item]:
    """Yield the rows of a Parquet file with their numbers.

    Raises:
        DataError: If pyarrow is not installed.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        msg = f"{path}: reading .parquet needs pyarrow: pip install 'prefixfast[data]', or write the rows as .jsonl"
        raise DataError(msg, path=path) from e
    number = 0
    try:
        file = parquet.ParquetFile(io.BytesIO(raw))
        check_expansion(path, len(raw), file.metadata.num_rows * file.metadata.num_columns, "cells")
        for batch in file.iter_batches():
            narrow = [f.name for f in batch.schema if f.type == arrow.float32()]
            for value in batch.to_pylist():
                number += 1
                value |= {name: short_float(value[name]) for name in narrow if value[name] is not None}
                yield FileRow(value, path, number)
    except DataError as e:
        yield e
    except (ValueError, OSError, arrow.ArrowException) as e:
        yield malformed(path, number + 1, f"cannot be read: {e}")
