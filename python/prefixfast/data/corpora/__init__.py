"""Official files of the paper's tasks: E2E as CSV, WebNLG 2017 and DART v1.1.1 as JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from prefixfast.data.corpora.corpus import CORPORA
from prefixfast.data.files import Item, file_items
from prefixfast.data.rows import Row
from prefixfast.errors import DataError, check_choice, check_string
from prefixfast.io.paths import as_path

logger = logging.getLogger(__name__)
SPLITS = ("train", "dev", "test")


def read_task(task: str, path: str | Path, split: Literal["train", "dev", "test"] = "train") -> list[Row]:
    """Read the rows of a task's official file. Files of other tasks, and files of rows, are read as by `read_rows`.

    Args:
        task: Name of the task. ``"e2e"`` reads a CSV file with the columns ``mr`` and ``ref``. ``"webnlg"`` reads the
            JSON of the 2017 challenge (``modifiedtripleset``, ``lexicalisations``). ``"dart"`` reads the JSON of
            v1.1.1 (``tripleset``, ``annotations``).
        path: Path of the file, also with ``.gz``.
        split: Split that the file holds. ``"train"`` keeps only the lexicalisations of WebNLG with the comment
            "good", as Li & Liang trained. ``"dev"`` and ``"test"`` keep all of them, and join the E2E rows of one
            meaning representation to one row with ``refs``, as evaluation needs them.

    Returns:
        Rows with ``mr`` or ``triples``, and ``ref`` or ``refs``. WebNLG rows also have ``category`` and ``id``, DART
        rows the ``source`` of their first text.

    Raises:
        ConfigError: If the split is unknown.
        DataError: If the file is malformed, with path and line, or has as many texts as the official file of another
            split.

    Example:
        ``train(base, read_task("webnlg", "webnlg/train.json"), task="webnlg")``
    """
    rows: list[Row] = []
    for item in task_items(task, as_path("path", path), split):
        if isinstance(item, DataError):
            raise item
        rows.append(item)
    if not rows:
        msg = f"{path}: expected at least one row, got none"
        raise DataError(msg, path=str(path))
    if error := other_split(task, rows, split):
        msg = f"{path}: {error}"
        raise DataError(msg, path=str(path))
    if warning := count_warning(task, rows, split):
        logger.warning("%s: %s", path, warning)
    return rows


def task_items(task: str, path: Path, split: str) -> Iterator[Item]:
    """Yield the rows that `read_task` reads, and a `DataError` in place of each malformed entry."""
    check_choice("split", split, SPLITS)
    check_string("task", task, "the name of a task")
    corpus = CORPORA.get(task)
    yield from file_items(path) if corpus is None else corpus.items(path, split)


def count_warning(task: str, rows: Iterable[Row], split: str) -> str | None:
    """Sentence on rows of a corpus that are not as many as its official file has; None for other tasks."""
    corpus = CORPORA.get(task)
    return None if corpus is None else corpus.count_warning(rows, split)


def other_split(task: str, rows: Iterable[Row], split: str) -> str | None:
    """Sentence on rows of a corpus that are those of another split; None for other rows and tasks."""
    corpus = CORPORA.get(task)
    return None if corpus is None else corpus.other_split(rows, split)
