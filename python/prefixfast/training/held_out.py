"""Rows that a run holds out of its own data, for ``eval_fraction``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from prefixfast.data.rows import Row
from prefixfast.errors import DataError, shown
from prefixfast.io.text import counted
from prefixfast.training.inputs import TrainingRows


def hold_out(rows: TrainingRows, fraction: float, seed: int, *, isolate: bool) -> TrainingRows:
    """Take held-out rows from the rows of each prefix.

    The choice depends on the seed and on the contents of the rows, not on their order. Equal rows stay together, as do
    the references of a row, so that no held-out example is also a training example.

    Args:
        rows: Rows without held-out rows.
        fraction: Fraction of the rows of each prefix, rounded down to whole rows.
        seed: Seed of the choice.
        isolate: Whether the error of a prefix with too few rows is noted, instead of raised.

    Raises:
        DataError: If a prefix has too few rows and ``isolate`` is not set, or no prefix is left.
    """
    kept: dict[str, list[Row]] = {}
    held: dict[str, list[Row]] = {}
    numbers: dict[str, list[int]] = {}
    held_numbers: dict[str, list[int]] = {}
    failed = dict(rows.failed)
    for name, own in rows.rows.items():
        number_in_data = rows.row_numbers.get(name) or range(1, len(own) + 1)
        chosen = _choose(own, fraction, seed)
        if not chosen:
            failed[name] = _too_few(own, fraction)
            if not isolate or rows.is_single:
                raise DataError(failed[name] if rows.is_single else f"prefix {shown(name)}: {failed[name]}")
            continue
        parts = ([i for i in range(len(own)) if i not in chosen], sorted(chosen))
        kept[name], held[name] = ([own[i] for i in part] for part in parts)
        numbers[name], held_numbers[name] = ([number_in_data[i] for i in part] for part in parts)
    if not kept:
        name, error = next(iter(failed.items()))
        msg = f"data: no prefix is left to train; of {shown(name)}: {error}"
        raise DataError(msg)
    rows.failed.update(failed)
    return replace(rows, rows=kept, eval_rows=held, row_numbers=numbers, eval_row_numbers=held_numbers)


def _choose(rows: Sequence[Row], fraction: float, seed: int) -> set[int]:
    """Numbers of the held-out rows; empty if the fraction is less than a row, or than each set of equal rows."""
    wanted = int(len(rows) * fraction + 1e-9)  # 0.29 * 100 is less than 29 in fp64
    equal: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        equal.setdefault(_digest(row, seed), []).append(i)
    chosen: set[int] = set()
    for _, numbers in sorted(equal.items()):
        if len(chosen) + len(numbers) <= wanted:
            chosen.update(numbers)
    return chosen


def _digest(row: Row, seed: int) -> bytes:
    content = repr(sorted(((str(k), v) for k, v in row.items()), key=lambda item: item[0]))
    return hashlib.sha256(f"{seed}:{content}".encode("utf8", "surrogatepass")).digest()


def _too_few(rows: Sequence[Row], fraction: float) -> str:
    num_rows, least = counted(len(rows), "row"), max(2, -int(-1 / fraction // 1))
    if len(rows) < least:
        return (
            f"eval_fraction={fraction:g} of {num_rows} is less than one row; give {least} rows or more, a larger "
            "eval_fraction, or eval_data"
        )
    return f"eval_fraction={fraction:g}: {num_rows} are equal to so many others that none can be held out"
