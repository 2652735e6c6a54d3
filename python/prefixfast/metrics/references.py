"""Reader of references: official files, rows, and text files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora import CORPORA, read_task, task_items
from prefixfast.data.corpora.corpus import TEXT_KEYS
from prefixfast.data.corpora.summaries import SOURCE, TARGET, pair_file
from prefixfast.data.files import SUFFIXES, file_items, file_kind, read_text
from prefixfast.data.files.kinds import CORPUS_BY_SUFFIX
from prefixfast.data.row_values import check_text, json_hint, only_key
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import ConfigError, DataError, check_choice, shown
from prefixfast.io.paths import as_path
from prefixfast.metrics.text_files import (
    is_text_file,
    item_rows,
    listed_values,
    row_errors,
    row_place,
    text_file_lines,
)

REFERENCE_KEYS = (*TEXT_KEYS, "highlights", "reference", "references")
# Further suffixes of official files, by task.
OFFICIAL_SUFFIXES: dict[str, tuple[str, ...]] = {
    "xsum": (SOURCE, ".summary", ".data"),
    "cnn_dailymail": (SOURCE, ".story"),
    "samsum": (SOURCE,),
    "dialogsum": (SOURCE,),
}


class Reference(NamedTuple):
    """The references of one text with their place, and the row that holds them (empty without one)."""

    texts: list[str]
    place: str
    row: Row


def read_references(references: Any, task: str, split: str | None) -> list[Reference]:
    """References of the texts of a task.

    Args:
        references: Path of an official file, of a file of rows, or of a text file: one reference a line, or one group
            of lines for each text, with an empty line between two. A ``.target`` file without its ``.source`` file has
            one reference a line, of which some can be empty. Or several paths (`pathlib.Path`) of text files with one
            line for each text, or an iterable of rows, of texts, or of lists of texts.
        task: Name of the task, whose official files are read.
        split: Split of the official file; None reads it with one row for each input.

    Raises:
        ConfigError: If the argument is none of these, or a split is given for no official file.
        DataError: If a file or row is malformed, or a text has no reference, with the place.
    """
    if isinstance(references, str | os.PathLike):
        return _file_references(as_path("references", references), task, split)
    values = listed_values("references", references)
    paths = [as_path("references", v) for v in values] if all(isinstance(v, os.PathLike) for v in values) else []
    if len(paths) == 1:
        return _file_references(paths[0], task, split)
    if split is not None:
        msg = f"split: expected none for references that are no official file, got {shown(split)}"
        raise ConfigError(msg)
    if paths:
        return _parallel_references(paths, task)
    return [_reference(value, i) for i, value in enumerate(values)]


def _file_references(path: Path, task: str, split: str | None) -> list[Reference]:
    if _is_official(path, task, split):
        return [_reference(row, i) for i, row in enumerate(_official_rows(path, task, split))]
    if split is not None:
        msg = f"split: expected none for a file of plain references, got {shown(split)} for {path}"
        raise ConfigError(msg)
    lines = text_file_lines(path, REFERENCE_KEYS)
    if file_kind(path) == TARGET or all(line.strip() for line in lines):
        return [Reference([line], f"{path}:{i}", {}) for i, line in enumerate(lines, 1)]
    return _groups(path, lines)


def _is_official(path: Path, task: str, split: str | None) -> bool:
    """Whether the readers of rows and of official files read a file of references, or refuse it with advice."""
    kind, suffixes = file_kind(path), OFFICIAL_SUFFIXES.get(task, ())
    if not is_text_file(path) or kind in suffixes:
        return True
    if kind == TARGET:
        return SOURCE in suffixes and (split is not None or pair_file(path, SOURCE).exists())
    if task == "e2e" and kind == ".txt":
        return _has_bars(path)
    return kind in CORPUS_BY_SUFFIX


def _official_rows(path: Path, task: str, split: str | None) -> list[Row]:
    """Rows of an official file or a file of rows. Without a split their number is not compared with the official."""
    if split is not None:
        check_choice("task", task, CORPORA)
        return read_task(task, path, split)  # type: ignore[arg-type]  # read_task checks the name
    if not path.is_dir() and file_kind(path) in SUFFIXES and _has_references_alone(path):
        return item_rows(file_items(path))
    return item_rows(task_items(task, path, "test"))


def _has_references_alone(path: Path) -> bool:
    """Whether a file of rows holds references without inputs, which the readers of official files refuse."""
    first = next(iter(file_items(path)), None)
    return isinstance(first, Mapping) and {*first} <= {"id", "subset", *REFERENCE_KEYS}


def _has_bars(path: Path) -> bool:
    """Whether each line is ``source||target``, as in the files of Li & Liang."""
    return all("||" in line for line in text_file_lines(path, REFERENCE_KEYS) if line.strip())


def _groups(path: Path, lines: Sequence[str]) -> list[Reference]:
    """Groups of lines with an empty line between two, as in the files of E2E's script."""
    groups: list[Reference] = []
    opened = False
    for number, line in enumerate(lines, 1):
        if line.strip() and opened:
            groups[-1].texts.append(line)
        elif line.strip():
            groups.append(Reference([line], f"{path}:{number}", {}))
        elif not opened and any(map(str.strip, lines[number:])):
            msg = f"{path}:{number}: expected a reference, got an empty line; one empty line stands between two groups"
            raise DataError(msg, path=str(path), line=number)
        opened = bool(line.strip())
    return groups


def _parallel_references(paths: Sequence[Path], task: str) -> list[Reference]:
    """References of several files with one line for each text, empty where a text has no further reference."""
    for path in paths:
        if file_kind(path) != TARGET and _is_official(path, task, None):
            msg = f"{path}: expected a text file with one line for each text, as each of several files of references "
            msg += "is, got a folder, a file of rows or an official file; give it alone"
            raise DataError(msg, path=str(path))
    columns = [text_file_lines(path, REFERENCE_KEYS) for path in paths]
    longest = max(map(len, columns))
    for path, column in zip(paths, columns, strict=True):
        if len(column) == longest - 1 and read_text(path).endswith("\n"):
            column.append("")  # files whose lines are joined have no line break after the last one
        if len(column) != longest:
            msg = f"{path}: expected {longest} lines as in the other files of references, got {len(column)}"
            raise DataError(msg, path=str(path))
    found = []
    for number, row in enumerate(zip(*columns, strict=True), 1):
        texts = [line for line in row if line.strip()]
        if not texts:
            msg = f"{paths[0]}:{number}: expected a reference of this text in one of the files, got empty lines"
            raise DataError(msg, path=str(paths[0]), line=number)
        found.append(Reference(texts, f"{paths[0]}:{number}", {}))
    return found


def _reference(value: Any, number: int) -> Reference:
    place = f"references: text {number}"
    row: Row = value if isinstance(value, Mapping) else {}
    with row_errors("references", row):
        if isinstance(value, Mapping):
            key = only_key(value, number, REFERENCE_KEYS)
            texts = _texts(value, number, key, value[key])
            return Reference(texts, row_place(value, "references", number), value)
        return Reference(_texts({}, number, "text", value), place, {})


def _texts(row: Row, number: int, key: str, value: JSON) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or (isinstance(value, str) and json_hint(value)):
        msg = f"{key}: expected a text or a list of texts, got {shown(value)}{json_hint(value)}"
        raise row_error(row, number, msg)
    return [check_text(row, number, f"{key}[{i}]", text) for i, text in enumerate(texts)]
