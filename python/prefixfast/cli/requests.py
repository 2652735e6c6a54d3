"""Rows of ``generate`` and ``score``: read from a file or standard input, and without columns that have no meaning."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.errors import ConfigError, DataError, PrefixFastError, RequestError, shown

if TYPE_CHECKING:
    from prefixfast.cli.prefix_flags import PrefixFlags
    from prefixfast.data.rows import Row
    from prefixfast.data.task import Task
    from prefixfast.store import PrefixStore

STDIN = Path("-")
STDIN_NAME = "standard input"
MEANINGS = ("prefix", "params", "chat_template_kwargs")  # keys whose misspelling would change results in silence
ALIKE = 0.75  # smallest similarity of a misspelling

logger = logging.getLogger(__name__)


def read_input(path: Path, encoding: str | None = None) -> list[Row]:
    """Rows of a file, or JSON lines of standard input for ``-``.

    Args:
        path: Path of the file.
        encoding: Encoding of a text file, None for that of the byte order mark or UTF-8.

    Raises:
        DataError: If the rows cannot be read, or there are none.
    """
    from prefixfast.cli.row_files import check_one_file
    from prefixfast.data import read_rows
    from prefixfast.data.files import json_line_items

    if path != STDIN:
        check_one_file(path)
        return read_rows(path, encoding)
    rows: list[Row] = []
    for item in json_line_items(sys.stdin.buffer.read(), STDIN_NAME, encoding):
        if isinstance(item, DataError):
            raise item
        rows.append(item)
    if not rows:
        msg = f"{STDIN_NAME}: expected at least one row as a JSON line, got none"
        raise DataError(msg)
    return rows


def read_split(path: Path, split: str, chosen: PrefixFlags, encoding: str | None = None) -> list[Row]:
    """Rows of a split's official file or folder, one for each input.

    The corpus is that of the prefixes' task, else the one whose layout the file shows.

    Args:
        path: Path of the file or folder.
        split: Split that it holds.
        chosen: Flags of the prefixes.
        encoding: Encoding of the flags, which official files do not have.

    Raises:
        ConfigError: If the split is unknown, or neither prefixes nor file show a corpus.
        DataError: If the file cannot be read, or holds another split.
    """
    from prefixfast.cli.row_files import check_one_file
    from prefixfast.data.row_reader import RowReader, corpus_of

    if path == STDIN:
        msg = f"--split: expected the path of an official file as IN, got {path} for {STDIN_NAME}"
        raise ConfigError(msg)
    check_one_file(path, official=True)
    opened = chosen.open_store()
    (task,) = _row_tasks([{}], chosen.headers([{}], opened), opened)
    return RowReader(encoding, split, corpus_of(task, path)).read(path)


def read_references(path: Path, split: str, chosen: PrefixFlags, encoding: str | None = None) -> list[Row]:
    """Rows of `read_split` with one reference each."""
    from prefixfast.data.row_reader import each_reference

    return each_reference(read_split(path, split, chosen, encoding))


def known_rows(rows: Sequence[Row], headers: Any, store: PrefixStore | None) -> list[Row]:
    """Rows without the columns that have no meaning, which are named in one log line.

    Args:
        rows: Rows of the input.
        headers: Headers of their prefixes, as `PrefixFlags.headers` gives them.
        store: Store of the prefixes that are given by name.

    Raises:
        DataError: If a column is the misspelling of a key that changes results.
    """
    from prefixfast.data.columns import has_own_columns
    from prefixfast.data.files import FileRow
    from prefixfast.data.layouts import layout_note, request_layout
    from prefixfast.engine.make_requests import has_input, unknown_keys

    found: list[Row] = []
    left_out: dict[str, None] = {}
    tasks = _row_tasks(rows, headers, store)
    for i, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        beside = {"text"} if _has_text_beside(row, task) else set()
        inputs = {key: value for key, value in row.items() if key not in beside}
        unknown = beside | (unknown_keys(inputs, task) if task.format != "columns" else set())
        if not unknown or not has_input(row, task):  # else the error of a row names all columns
            found.append(row)
            continue
        _check_spelling(row, i, unknown)
        left_out |= dict.fromkeys(key for key in row if key in unknown)
        known = {key: value for key, value in row.items() if key not in unknown}
        found.append(FileRow(known, row.path, row.line) if isinstance(row, FileRow) else known)
    layout = None if has_own_columns(tasks[0], rows[0]) else request_layout(found[0], tasks[0].format)
    if layout is not None and (note := layout_note(found, layout.format)):
        logger.info("%s", note)
    if left_out:
        names = ", ".join(map(shown, left_out))
        logger.info("columns that are copied to the output and not read by the model: %s", names)
    return found


def _has_text_beside(row: Row, task: Task) -> bool:
    """Whether the text of a row is a column beside its input, as in a file that `generate` has written."""
    from prefixfast.data.formats import FORMATS, INPUT_KEYS
    from prefixfast.data.layouts import recognized_layout

    if row.get("text") is None or task.format == "columns" or "text" in FORMATS[task.format].inputs:
        return False
    others = {key: value for key, value in row.items() if key != "text" and value is not None}
    return not {*INPUT_KEYS, "input_ids"}.isdisjoint(others) or recognized_layout(others) is not None


@contextlib.contextmanager
def errors_by_place(rows: Sequence[Row]) -> Iterator[None]:
    """Context manager in which the error of a request begins with file and line of its row, if the row has them."""
    from prefixfast.data.files import FileRow

    try:
        yield
    except RequestError as e:
        row, text = None if e.index is None else rows[e.index], str(e).removeprefix(f"request {e.index}: ")
        if not isinstance(row, FileRow) or text == str(e):
            raise
        place = f"{row.path}:{row.line}: "
        raise RequestError(place + text.removeprefix(place), index=e.index) from e


def _row_tasks(rows: Sequence[Row], headers: Any, store: PrefixStore | None) -> list[Task]:
    """Task of each row's prefix. A row with a wrong prefix has that of plain prompts, since its error comes later."""
    from prefixfast.data.builtin_tasks import PLAIN
    from prefixfast.engine.call_checks import PREFIX_TYPES
    from prefixfast.engine.make_requests import prefix_tasks
    from prefixfast.engine.request_prefixes import assign_prefixes
    from prefixfast.prefix.header import PrefixHeader

    types = (*PREFIX_TYPES, PrefixHeader)
    try:
        return prefix_tasks(assign_prefixes(rows, headers, store, types))
    except PrefixFastError:
        tasks = []
        for i, row in enumerate(rows):
            own = [headers[i]] if isinstance(headers, list) else headers
            try:
                tasks += prefix_tasks(assign_prefixes([row], own, store, types))
            except PrefixFastError:
                tasks.append(PLAIN)
        return tasks


def _check_spelling(row: Row, number: int, unknown: set[str]) -> None:
    from prefixfast.data.rows import row_error

    meanings = (*MEANINGS, "tools") if "messages" in row else MEANINGS
    for key in sorted(map(str, unknown)):
        for meant in difflib.get_close_matches(key, [m for m in meanings if m not in row], n=1, cutoff=ALIKE):
            msg = f"unknown column {shown(key)}: did you mean {shown(meant)}? Rename it, or give it a less similar name"
            raise row_error(row, number, msg)
