"""Rows of Parquet files, which pyarrow reads."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from typing import Any

from prefixfast.data.files.items import FileRow, Item, malformed
from prefixfast.data.files.raw import CELL_BYTES, ROW_BYTES, Expansion
from prefixfast.errors import DataError

MANY_ROWS, FEW_ROWS = 2**16, 2**8  # read at once
TEXT_BUFFERS = 3  # of an array of texts: which are there, where each begins, and the texts


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
        _check_sizes(file, path, len(raw))
        # A text that is stored once for many rows stays so until its size in all rows is known. pyarrow cannot do this
        # for texts in lists, structures and maps, of which few rows are read at once.
        columns = [file.schema.column(i) for i in range(len(file.schema))]
        texts = [c.name for c in columns if c.physical_type == "BYTE_ARRAY" and c.name == c.path]
        file = parquet.ParquetFile(io.BytesIO(raw), read_dictionary=texts)
        expansion = Expansion(path, len(raw))
        for batch in file.iter_batches(FEW_ROWS if any(c.name != c.path for c in columns) else MANY_ROWS):
            expansion.add(ROW_BYTES * batch.num_rows + sum(map(_num_bytes, batch.columns)))
            narrow = [f.name for f in batch.schema if f.type == arrow.float32()]
            for value in batch.to_pylist():
                number += 1
                value |= {name: short_float(value[name]) for name in narrow if value[name] is not None}
                yield FileRow(value, path, number)
    except DataError as e:
        yield e
    except (ValueError, OSError, arrow.ArrowException) as e:
        yield malformed(path, number + 1, f"cannot be read: {e}")


def _check_sizes(file: Any, path: str, size: int) -> None:
    """Raise `DataError` for the sizes of a decompression bomb in the metadata, before any page is decompressed."""
    expansion = Expansion(path, size)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for place in range(group.num_columns):
            chunk, width = group.column(place), max(CELL_BYTES, file.schema.column(place).length or 0)
            expansion.add(max(chunk.total_uncompressed_size, chunk.num_values * width))


def _num_bytes(array: Any) -> int:
    """Bytes of the values of an array, each counted in every row."""
    if not hasattr(array, "dictionary") or array.type.value_type.num_buffers < TEXT_BUFFERS:
        return int(array.nbytes)
    lengths = importlib.import_module("pyarrow.compute").binary_length(array.dictionary)
    return int(lengths.take(array.indices).sum().as_py() or 0)
