"""Readers of outputs and references, and the check that they belong together."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora import CORPORA, read_task, task_items
from prefixfast.data.corpora.corpus import TEXT_KEYS
from prefixfast.data.corpora.summaries import SOURCE, TARGET, pair_file
from prefixfast.data.files import SUFFIXES, FileRow, Item, file_items, file_kind, read_text
from prefixfast.data.files.kinds import ADVICE_BY_SUFFIX, CORPUS_BY_SUFFIX, JSON_TABLE, PLAIN_TEXT
from prefixfast.data.formats import FORMATS
from prefixfast.data.row_values import check_text, json_hint, only_key, text_value
from prefixfast.data.rows import Row, is_table_row, row_error
from prefixfast.errors import ConfigError, DataError, check_choice, shown
from prefixfast.io.paths import as_path

PathLike: TypeAlias = str | os.PathLike[str]
OUTPUT_KEYS = ("text", "output", "prediction", "hypothesis")  # of rows, which have one of them
REFERENCE_KEYS = (*TEXT_KEYS, "highlights", "reference", "references")
TABLE_KEYS = FORMATS["table"].inputs
COMPARED_KEYS = ("id", *TABLE_KEYS, "document", "article", "dialogue")
ROW_SUFFIXES = (*SUFFIXES, ".xml")
# Further suffixes of official files, by task.
OFFICIAL_SUFFIXES: dict[str, tuple[str, ...]] = {
    "xsum": (SOURCE, ".summary", ".data"),
    "cnn_dailymail": (SOURCE, ".story"),
    "samsum": (SOURCE,),
    "dialogsum": (SOURCE,),
}
START = 1000  # characters of a text file in which a row shows its keys


class Output(NamedTuple):
    """An output with its place, and the other columns of its row (empty without one)."""

    text: str
    place: str
    row: Row


class Reference(NamedTuple):
    """The references of one text with their place, and the row that holds them (empty without one)."""

    texts: list[str]
    place: str
    row: Row


def read_outputs(outputs: Any) -> list[Output]:
    """Outputs of any system.

    Args:
        outputs: Path of a file of rows, or of one text a line; or an iterable of texts, of rows, or of objects with
            the text under ``text``, such as `Generation`.

    Raises:
        ConfigError: If the argument is none of these.
        DataError: If a file or row is malformed, or its request failed, with the place.
    """
    if isinstance(outputs, str | os.PathLike):
        path = as_path("outputs", outputs)
        if _is_text(path):
            return [Output(line, f"{path}:{i}", {}) for i, line in enumerate(_lines(path, OUTPUT_KEYS), 1)]
        return [_row_output(row, i) for i, row in enumerate(_rows(file_items(path)))]
    return [_output(value, i) for i, value in enumerate(_listed("outputs", outputs))]


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
    values = _listed("references", references)
    paths = [as_path("references", v) for v in values] if all(isinstance(v, os.PathLike) for v in values) else []
    if len(paths) == 1:
        return _file_references(paths[0], task, split)
    if split is not None:
        msg = f"split: expected none for references that are no official file, got {shown(split)}"
        raise ConfigError(msg)
    if paths:
        return _parallel_references(paths, task)
    return [_reference(value, i) for i, value in enumerate(values)]


def check_pairs(outputs: Sequence[Output], references: Sequence[Reference]) -> None:
    """Check that outputs and references are those of the same inputs, in the same order.

    Raises:
        DataError: If there are none, if their numbers differ, or if the id or the input of a pair differs.
    """
    if len(outputs) != len(references) or not outputs:
        got = f"{len(outputs)} outputs{_source(outputs)} and {len(references)} groups{_source(references)}"
        msg = f"expected one group of references for each output, got {got}; each input has one output, and all its "
        msg += "references are one group"
        raise DataError(msg)
    for output, reference in zip(outputs, references, strict=True):
        for key in COMPARED_KEYS:
            ours, theirs = output.row.get(key), reference.row.get(key)
            if ours is not None and theirs is not None and not _same(ours, theirs):
                msg = f"{output.place}: expected the {key} of the references at {reference.place}, {shown(theirs)}, "
                msg += f"got {shown(ours)}; outputs and references are matched by position, so bring them in one order"
                raise DataError(msg)


def tables_of(rows: Iterable[Row]) -> list[Row] | None:
    """The rows if each holds a table, None otherwise."""
    found = list(rows)
    return found if all(any(row.get(key) is not None for key in TABLE_KEYS) for row in found) else None


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        msg = f"{name}: expected a path, or a list of texts or rows, got {shown(values)}"
        raise ConfigError(msg)
    return list(values)


def _source(found: Sequence[Output] | Sequence[Reference]) -> str:
    """Name of the file of outputs or references, empty for others."""
    path = found[0].place.rpartition(":")[0] if found else ""
    return f" in {path}" if path not in ("", "outputs", "references") else ""


def _is_text(path: Path) -> bool:
    """Whether a file holds lines of text. A reader of rows reads any other, or refuses it with advice."""
    kind = file_kind(path)
    is_known = kind in ROW_SUFFIXES or ADVICE_BY_SUFFIX.get(kind, PLAIN_TEXT) != PLAIN_TEXT
    return not path.is_dir() and (kind in CORPUS_BY_SUFFIX or not is_known) and kind not in ROW_SUFFIXES


def _is_official(path: Path, task: str, split: str | None) -> bool:
    """Whether the readers of rows and of official files read a file of references, or refuse it with advice."""
    kind, suffixes = file_kind(path), OFFICIAL_SUFFIXES.get(task, ())
    if not _is_text(path) or kind in suffixes:
        return True
    if kind == TARGET:
        return SOURCE in suffixes and (split is not None or pair_file(path, SOURCE).exists())
    if task == "e2e" and kind == ".txt":
        return _has_bars(path)
    return kind in CORPUS_BY_SUFFIX


def _lines(path: Path, keys: Sequence[str]) -> list[str]:
    r"""Lines of a text file. ``\n`` and ``\r\n`` end a line, and no other character, as in JSON lines.

    Args:
        path: Path of the file.
        keys: Keys of texts, of which a row would have one.

    Raises:
        DataError: If the file cannot be read, or holds rows in JSON.
    """
    text = read_text(path)
    if JSON_TABLE.match(text[:START].encode()) and re.search(rf'"({"|".join(keys)})"\s*:', text[:START]):
        msg = f"{path}: expected one text a line, got rows in JSON; name the file .json or .jsonl"
        raise DataError(msg, path=str(path))
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


@contextlib.contextmanager
def _named(name: str, row: Row) -> Iterator[None]:
    """Context manager that puts the name of the argument before the error of a row that is in no file."""
    try:
        yield
    except DataError as e:
        if isinstance(row, FileRow):
            raise
        msg = f"{name}: {e}"
        raise DataError(msg, line=e.line) from e


def _output(value: Any, number: int) -> Output:
    place = f"outputs: text {number}"
    if isinstance(value, Mapping):
        return _row_output(value, number)
    if isinstance(value, str):
        with _named("outputs", {}):
            return Output(check_text({}, number, "text", value), place, {})
    if isinstance(getattr(value, "text", None), str):  # a Generation; its class would import the engine
        row = {"text": value.text, "id": getattr(value, "id", None), "error": getattr(value, "error", None)}
        return _row_output(row, number)
    msg = f"{place}: expected a string, a row or a Generation, got {shown(value)}"
    raise DataError(msg)


def _row_output(row: Row, number: int) -> Output:
    with _named("outputs", row):
        if row.get("error") is not None:
            raise row_error(row, number, f"expected a text, got the error of a failed request, {shown(row['error'])}")
        return Output(_output_text(row, number), _place(row, "outputs", number), row)


def _output_text(row: Row, number: int) -> str:
    texts = [row[key] for key in OUTPUT_KEYS if row.get(key) is not None]
    if not texts and (key := next((key for key in OUTPUT_KEYS if key in row), None)):
        return "" if is_table_row(row) else text_value(row, number, key)  # a table has None in an empty cell
    if len(texts) > 1 and all(text == texts[0] for text in texts):
        key = next(key for key in OUTPUT_KEYS if row.get(key) is not None)
    else:
        key = only_key(row, number, OUTPUT_KEYS)
    return check_text(row, number, key, row[key])


def _place(row: Row, name: str, number: int) -> str:
    return f"{row.path}:{row.line}" if hasattr(row, "path") and hasattr(row, "line") else f"{name}: row {number}"


def _file_references(path: Path, task: str, split: str | None) -> list[Reference]:
    if _is_official(path, task, split):
        return [_reference(row, i) for i, row in enumerate(_official_rows(path, task, split))]
    if split is not None:
        msg = f"split: expected none for a file of plain references, got {shown(split)} for {path}"
        raise ConfigError(msg)
    lines = _lines(path, REFERENCE_KEYS)
    if file_kind(path) == TARGET or all(line.strip() for line in lines):
        return [Reference([line], f"{path}:{i}", {}) for i, line in enumerate(lines, 1)]
    return _groups(path, lines)


def _official_rows(path: Path, task: str, split: str | None) -> list[Row]:
    """Rows of an official file or a file of rows. Without a split their number is not compared with the official."""
    if split is not None:
        check_choice("task", task, CORPORA)
        return read_task(task, path, split)  # type: ignore[arg-type]  # read_task checks the name
    if not path.is_dir() and file_kind(path) in SUFFIXES and _has_references_alone(path):
        return _rows(file_items(path))
    return _rows(task_items(task, path, "test"))


def _rows(items: Iterable[Item]) -> list[Row]:
    """Rows of a file; the first malformed one is raised."""
    rows: list[Row] = []
    for item in items:
        if isinstance(item, DataError):
            raise item
        rows.append(item)
    return rows


def _has_references_alone(path: Path) -> bool:
    """Whether a file of rows holds references without inputs, which the readers of official files refuse."""
    first = next(iter(file_items(path)), None)
    return isinstance(first, Mapping) and {*first} <= {"id", "subset", *REFERENCE_KEYS}


def _has_bars(path: Path) -> bool:
    """Whether each line is ``source||target``, as in the files of Li & Liang."""
    return all("||" in line for line in _lines(path, REFERENCE_KEYS) if line.strip())


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
    columns = [_lines(path, REFERENCE_KEYS) for path in paths]
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
    with _named("references", row):
        if isinstance(value, Mapping):
            key = only_key(value, number, REFERENCE_KEYS)
            texts = _texts(value, number, key, value[key])
            return Reference(texts, _place(value, "references", number), value)
        return Reference(_texts({}, number, "text", value), place, {})


def _texts(row: Row, number: int, key: str, value: JSON) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or (isinstance(value, str) and json_hint(value)):
        msg = f"{key}: expected a text or a list of texts, got {shown(value)}{json_hint(value)}"
        raise row_error(row, number, msg)
    return [check_text(row, number, f"{key}[{i}]", text) for i, text in enumerate(texts)]


def _same(ours: JSON, theirs: JSON) -> bool:
    """Whether two values are equal but for white space, and for the type of a number in a cell of a table."""
    return _as_text(ours).split() == _as_text(theirs).split()


def _as_text(value: Any) -> str:
    """A value as `generate` writes it into a table; columns of Parquet files also have dates, and values of numpy."""
    value = _plain(value)
    if not isinstance(value, bool | int | float | Mapping | Sequence) or isinstance(value, str):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _plain(value: Any) -> Any:
    """A value of numpy, a scalar or an array, as one of Python; any other value that JSON lacks as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | Mapping | Sequence) else str(value)
