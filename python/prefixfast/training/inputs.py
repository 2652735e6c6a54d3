"""The rows of a training run by prefix: one prefix, one for each name, or one for each value of a column."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefixfast.data.column_names import column_error, listed
from prefixfast.data.column_text import find_columns
from prefixfast.data.columns import check_columns, empty_values, reserved_notes, unread_columns
from prefixfast.data.encode import check_examples
from prefixfast.data.files import FileRow
from prefixfast.data.layouts import layout_note
from prefixfast.data.row_reader import RowReader
from prefixfast.data.rows import Row, Rows, row_error
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError, check_string, named_errors, shown
from prefixfast.io.progress import track

logger = logging.getLogger(__name__)

SINGLE_NAME = "prefix"  # name of the prefix of plain rows in logs and in a store


@dataclass(frozen=True)
class TrainingRows:
    """Rows of a training run.

    Attributes:
        rows: Rows by prefix.
        eval_rows: Held-out rows by prefix, None without held-out rows. Prefixes may share one list.
        is_single: Whether the run trains one prefix on plain rows.
        failed: Error message of each prefix that cannot be trained. The run adds prefixes that fail later.
        row_numbers: Numbers, from 1, of each prefix's rows in the data that a ``prefix_column`` or ``eval_fraction``
            splits.
        eval_row_numbers: Numbers, from 1, of each prefix's held-out rows in the data that they were taken from.
    """

    rows: dict[str, list[Row]]
    eval_rows: dict[str, list[Row]] | None
    is_single: bool
    failed: dict[str, str]
    row_numbers: dict[str, list[int]] = field(default_factory=dict)
    eval_row_numbers: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading the rows of a run.

    Attributes:
        prefix_column: Key of plain rows whose value names the row's prefix.
        isolate: Whether an error of one name's rows is noted as a failure, instead of raised.
        keep_column: Whether rows keep the column of their prefix's name, for a task of columns that may read it.
        reader: Reader of rows and files.
    """

    prefix_column: str | None = None
    isolate: bool = True
    keep_column: bool = False
    reader: RowReader = field(default_factory=RowReader)


def read_training_rows(
    data: Rows | Mapping[str, Rows], eval_data: Rows | Mapping[str, Rows] | None, options: ReadOptions
) -> TrainingRows:
    """Read all rows of a run.

    Args:
        data: Rows, or rows by name.
        eval_data: Held-out rows for all prefixes, by the same names, or with the same column.
        options: Options of reading.

    Raises:
        ConfigError: If the names of ``data`` and ``eval_data`` differ, ``prefix_column`` is given with a mapping, the
            encoding is unknown, or a split is given for rows in memory.
        DataError: If rows cannot be read and the error is not isolated, or no prefix has rows.
    """
    failed: dict[str, str] = {}
    row_numbers: dict[str, list[int]] = {}
    column = options.prefix_column
    check_string("prefix_column", "" if column is None else column, "the name of a column")
    if isinstance(data, Mapping):
        if column is not None:
            msg = "prefix_column: expected plain rows beside it, got a mapping of names; leave one of them out"
            raise ConfigError(msg)
        rows = _read_by_name(data, failed, options, options.reader.read)
        if not data:
            msg = "data: expected at least one name with rows, got an empty mapping"
            raise DataError(msg)
    elif column is not None:
        rows, row_numbers = _split_by_column(options.reader.read(data), column, keep=options.keep_column)
    else:
        rows = {SINGLE_NAME: options.reader.read(data)}
    names = [*rows, *failed]
    eval_rows = None if eval_data is None else _read_eval_rows(eval_data, names, failed, options)
    rows = {n: r for n, r in rows.items() if n not in failed}
    if not rows:
        name, error = next(iter(failed.items()))
        msg = f"data: none of the {len(names)} prefixes has rows that can be read; of {shown(name)}: {error}"
        raise DataError(msg)
    is_single = not isinstance(data, Mapping) and column is None
    return TrainingRows(rows, eval_rows, is_single, failed, row_numbers)


def check_task_rows(rows: TrainingRows, task: Task) -> None:
    """Check that the rows have the columns that the task reads, and log what a reader of the rows should know.

    Args:
        rows: Rows of the run.
        task: Task of the rows.

    Raises:
        DataError: If no row has a column that a task of columns reads.
    """
    every = list(itertools.chain.from_iterable(rows.rows.values()))
    check_columns(task, every)
    if note := layout_note(every, task.format):
        logger.info("%s", note)
    elif task.format != "columns" and (unread := unread_columns(task, every)):
        logger.info("columns that are not read: %s", listed(unread))
    if notes := reserved_notes(task, every):
        logger.info("%s", "; ".join(notes))
    for warning in empty_values(task, every):
        logger.warning("%s", warning)


def number_in_data(error: DataError, row_numbers: Sequence[int] | None) -> DataError:
    """The error with the row's number in the whole data; rows of files already have a line."""
    line = error.line
    if row_numbers is None or error.path is not None or line is None or not 0 < line <= len(row_numbers):
        return error
    number = row_numbers[line - 1]
    return DataError(f"{error} (row {number} of the data)", path=error.path, line=number)


def check_formats(rows: TrainingRows, task: Task, *, isolate: bool) -> TrainingRows:
    """Check the format of all rows as far as no tokenizer is needed.

    Args:
        rows: Rows of the run.
        task: Task of the rows.
        isolate: Whether an error of one prefix's rows is noted in ``failed``, instead of raised.

    Returns:
        Rows of the prefixes whose format is right.

    Raises:
        DataError: If a row is malformed and ``isolate`` is not set, or no prefix is left.
    """
    met: dict[int, DataError | None] = {}  # by identity, since prefixes may share held-out rows
    for by_name in (rows.rows, rows.eval_rows or {}):
        for name, own in by_name.items():
            if name in rows.failed:
                continue
            if id(own) not in met:
                met[id(own)] = _format_error(name, own, task)
            if (error := met[id(own)]) is None:
                continue
            numbers = rows.row_numbers.get(name) if by_name is rows.rows else None
            numbered = number_in_data(error, numbers)
            if not isolate:
                raise numbered from error
            rows.failed[name] = str(numbered)
    left = {name: own for name, own in rows.rows.items() if name not in rows.failed}
    if not left:
        name, text = next(iter(rows.failed.items()))
        msg = f"data: no prefix is left to train; of {shown(name)}: {text}"
        raise DataError(msg)
    return replace(rows, rows=left)


def _format_error(name: str, rows: list[Row], task: Task) -> DataError | None:
    try:
        with named_errors(f"prefix {shown(name)}, ", DataError):
            check_examples(rows, task)
    except DataError as e:
        return e
    return None


def _read_by_name(
    data: Mapping[str, Rows], failed: dict[str, str], options: ReadOptions, read: Callable[[Rows], list[Row]]
) -> dict[str, list[Row]]:
    found = {}
    with track(data.items(), "read rows", len(data), "names") as each:
        for name, rows in each:
            try:
                found[_name(name)] = read(rows)
            except DataError as e:
                if not options.isolate:
                    raise
                failed[_name(name)] = str(e)
    return found


def _name(key: object) -> str:
    """Name of a prefix from a key of the data; integers are names too."""
    name = shown(key) if type(key) is int else key
    check_string("data", name, "names of prefixes as strings")
    return str(name)


def _split_by_column(rows: list[Row], column: str, *, keep: bool) -> tuple[dict[str, list[Row]], dict[str, list[int]]]:
    """Rows by the value of a column, with or without the column, and their numbers for rows that have no line."""
    found: dict[str, list[Row]] = {}
    numbers: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        (key,) = find_columns((column,), tuple(row))
        if key is None:
            raise row_error(row, i, f"prefix_column: {column_error(column, row)}")
        name = row[key]
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise row_error(row, i, f"{key}: expected the name of the row's prefix (prefix_column), got {shown(name)}")
        own = {k: v for k, v in row.items() if keep or k != key}
        found.setdefault(str(name), []).append(FileRow(own, row.path, row.line) if isinstance(row, FileRow) else own)
        if not isinstance(row, FileRow):
            numbers.setdefault(str(name), []).append(i + 1)
    return found, numbers


def _read_eval_rows(
    data: Rows | Mapping[str, Rows], names: list[str], failed: dict[str, str], options: ReadOptions
) -> dict[str, list[Row]]:
    column = options.prefix_column
    if isinstance(data, Mapping):
        found = _read_by_name(data, failed, options, options.reader.held_out)
    else:
        rows = options.reader.held_out(data)
        if column is None or all(find_columns((column,), tuple(row)) == (None,) for row in rows):
            return dict.fromkeys(names, rows)
        found, _ = _split_by_column(rows, column, keep=options.keep_column)
    if unmatched := sorted(set(names) ^ {*found, *failed}):
        msg = f"eval_data: expected the names of data, got {unmatched[:5]} in one of them only"
        raise ConfigError(msg)
    return found
