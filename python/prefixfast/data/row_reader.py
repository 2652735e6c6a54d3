"""Rows of a run or a command: rows as they are, or those of a split of a public corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefixfast.config.json_types import JSON
from prefixfast.data.columns import TaskLike
from prefixfast.data.corpora import CORPORA, SPLITS, read_task
from prefixfast.data.corpora.webnlg import ENTRIES
from prefixfast.data.files import SUFFIXES, FileRow, file_items, read_text
from prefixfast.data.formats import FORMATS
from prefixfast.data.rows import Row, Rows, read_rows
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, check_choice, shown

# Corpora by the first key that rows of their files have, beside WebNLG, whose files are XML or have entries.
CORPUS_BY_KEY = {
    "mr": "e2e",
    "tripleset": "dart",
    "highlighted_cells": "totto",
    "article": "cnn_dailymail",
    "fname": "dialogsum",
    "topic": "dialogsum",
    "dialogue": "samsum",
    "document": "xsum",
}


@dataclass(frozen=True)
class RowReader:
    """Reader of rows, of files of rows, and of the official files of a corpus.

    Args:
        encoding: Encoding of files of rows, as for `read_rows`.
        split: Split that the official files hold. None reads rows and files of rows.
        task: Task, as for `train`, whose official files are read.

    Raises:
        ConfigError: If the split is unknown, the task has no official files, or ``encoding`` is given with ``split``.
    """

    encoding: str | None = None
    split: str | None = None
    task: TaskLike = None

    def __post_init__(self) -> None:
        if self.split is None:
            return
        check_choice("split", self.split, SPLITS)
        if self.encoding is not None:
            msg = "encoding: expected no split beside it, since official files are UTF-8"
            raise ConfigError(msg)
        corpus_name(self.task)

    def read(self, rows: Rows) -> list[Row]:
        """Read all rows, as `read_rows` does, or as `read_task` does if there is a split.

        Args:
            rows: Rows, or the path of a file. With a split, the path of an official file or folder.

        Raises:
            ConfigError: If there is a split, and ``rows`` is no path.
            DataError: If rows cannot be read, or the file holds another split.
        """
        if self.split is None:
            return read_rows(rows, self.encoding)
        if not isinstance(rows, str | os.PathLike):
            msg = f"split: expected the path of an official file beside it, got {shown(rows)}; read_task reads the rows"
            raise ConfigError(msg)
        split: Any = self.split  # one of SPLITS
        return read_task(corpus_name(self.task), Path(rows), split)

    def held_out(self, rows: Rows) -> list[Row]:
        """Read held-out rows: official files as the split ``"dev"``, and rows in memory as they are."""
        if self.split is None or not isinstance(rows, str | os.PathLike):
            return read_rows(rows, self.encoding)
        return replace(self, split="dev").read(rows)


def corpus_name(task: TaskLike) -> str:
    """Name of the corpus whose official files a task has.

    Args:
        task: Task, as for `train`.

    Raises:
        ConfigError: If the task has no official files, or there is none.
    """
    name = task.get("name") if isinstance(task, Mapping) else task.name if isinstance(task, Task) else task
    if not isinstance(name, str) or name not in CORPORA:
        got = "no task" if name is None else f"the task {shown(name)}"
        msg = f"split: expected a task with official files beside it ({', '.join(CORPORA)}), got {got}"
        raise ConfigError(msg)
    return name


def corpus_of(task: Task, path: Path) -> str:
    """Name of the corpus of a task, or else of the corpus whose layout a file shows.

    Args:
        task: Task of the prefixes that read the rows.
        path: Path of an official file.

    Raises:
        ConfigError: If the task has no official files and the file shows no corpus.
        DataError: If the file cannot be read.
    """
    if task.name in CORPORA:
        return task.name
    kinds = {s.lower() for s in path.suffixes}
    if ".xml" in kinds:
        return "webnlg"
    if ".txt" in kinds:
        return "e2e"  # the texts of Li & Liang
    if path.is_dir() or kinds.isdisjoint(SUFFIXES):
        return corpus_name(task)
    if ".json" in kinds and ENTRIES.match(read_text(path)):
        return "webnlg"
    first = next(file_items(path), None)
    keys = first if isinstance(first, FileRow) else {}
    return next((name for key, name in CORPUS_BY_KEY.items() if key in keys), None) or corpus_name(task)


def each_reference(rows: list[Row]) -> list[Row]:
    """Rows with one reference each, in the order of the references. Rows without ``refs`` stay as they are.

    Args:
        rows: Rows of a corpus.

    Example:
        >>> each_reference([{"mr": "name[A]", "refs": ["One.", "Two."]}])
        [{'mr': 'name[A]', 'ref': 'One.'}, {'mr': 'name[A]', 'ref': 'Two.'}]
    """
    found: list[Row] = []
    for row in rows:
        refs = row.get("refs")
        if not isinstance(refs, list):
            found.append(row)
            continue
        key = FORMATS["document"].targets[0] if "document" in row else FORMATS["table"].targets[0]
        for ref in refs:
            own: dict[str, JSON] = {k: v for k, v in row.items() if k != "refs"} | {key: ref}
            found.append(FileRow(own, row.path, row.line) if isinstance(row, FileRow) else own)
    return found
