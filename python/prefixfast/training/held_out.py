"""Rows that a run holds out of its own data, for ``eval_fraction``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from prefixfast.data.formats import NAMED_KEYS, REQUEST_KEYS, TOKENIZED_KEYS
from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.errors import DataError, shown
from prefixfast.io.text import counted
from prefixfast.training.inputs import TrainingRows


def hold_out(rows: TrainingRows, task: Task, fraction: float, seed: int, *, isolate: bool) -> TrainingRows:
    """Take held-out rows from the rows of each prefix.

    The choice depends on the seed and on what the task reads of the rows, not on their order. Rows that are equal in it
    stay together, as do the references of a row, so that no held-out example is also a training example.

    Args:
        rows: Rows without held-out rows, in the format of the task.
        task: Task of the rows.
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
        chosen = choose_held_out(_contents(own, task), fraction, seed)
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


def _contents(rows: Sequence[Row], task: Task) -> list[str]:
    """Content of each row that the task reads: prompt and targets, or keys of a conversation or of token ids."""
    texts = [i for i, row in enumerate(rows) if not (task.is_tokenized(row) or task.is_chat(row))]
    pairs = dict(zip(texts, task.pairs([rows[i] for i in texts], "{eos}"), strict=True))
    return [repr(pairs[i] if i in pairs else _read_items(row, task)) for i, row in enumerate(rows)]


def _read_items(row: Row, task: Task) -> list[tuple[str, object]]:
    keys = TOKENIZED_KEYS if task.is_tokenized(row) else NAMED_KEYS.difference(REQUEST_KEYS)
    return sorted(((k, v) for k, v in row.items() if k in keys), key=lambda item: item[0])


def choose_held_out(contents: Sequence[str], fraction: float, seed: int) -> set[int]:
    """Choose held-out rows. The choice does not depend on the order of the rows, and equal rows stay together.

    Args:
        contents: Text by which rows are equal, for each row.
        fraction: Fraction of the rows, rounded down to whole rows.
        seed: Seed of the choice.

    Returns:
        Numbers of the held-out rows. They are empty if the fraction is less than a row, or than each set of equal rows.
    """
    wanted = int(len(contents) * fraction + 1e-9)  # 0.29 * 100 is less than 29 in fp64
    equal: dict[bytes, list[int]] = {}
    for i, content in enumerate(contents):
        equal.setdefault(_digest(content, seed), []).append(i)
    chosen: set[int] = set()
    for _, numbers in sorted(equal.items()):
        if len(chosen) + len(numbers) <= wanted:
            chosen.update(numbers)
    return chosen


def _digest(content: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{content}".encode("utf8", "surrogatepass")).digest()


def _too_few(rows: Sequence[Row], fraction: float) -> str:
    num_rows, least = counted(len(rows), "row"), max(2, -int(-1 / fraction // 1))
    if len(rows) < least:
        return (
            f"eval_fraction={fraction:g} of {num_rows} is less than one row; give {least} rows or more, a larger "
            "eval_fraction, or eval_data"
        )
    return f"eval_fraction={fraction:g}: {num_rows} are equal to so many others that none can be held out"
