"""Official files of public corpora, each in the layouts of its authors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from prefixfast.data.corpora.cnn_dailymail import CNN_DAILYMAIL
from prefixfast.data.corpora.corpus import Corpus
from prefixfast.data.corpora.dart import DART
from prefixfast.data.corpora.dialogsum import DIALOGSUM
from prefixfast.data.corpora.e2e import E2E
from prefixfast.data.corpora.samsum import SAMSUM
from prefixfast.data.corpora.totto import TOTTO
from prefixfast.data.corpora.webnlg import WEBNLG
from prefixfast.data.corpora.xsum import XSUM
from prefixfast.data.files import Item, file_items
from prefixfast.data.rows import Row
from prefixfast.errors import DataError, check_choice, check_string
from prefixfast.io.paths import as_path

logger = logging.getLogger(__name__)
SPLITS = ("train", "dev", "test")
CORPORA: dict[str, Corpus] = {
    corpus.name: corpus for corpus in (E2E, WEBNLG, DART, TOTTO, XSUM, CNN_DAILYMAIL, SAMSUM, DIALOGSUM)
}


def read_task(task: str, path: str | Path, split: Literal["train", "dev", "test"] = "train") -> list[Row]:
    """Read the rows of a task's official file. Files of other tasks, and files of rows, are read as by `read_rows`.

    Args:
        task: Name of the task: ``"e2e"``, ``"webnlg"``, ``"dart"``, ``"totto"``, ``"xsum"``, ``"cnn_dailymail"``,
            ``"samsum"`` or ``"dialogsum"``. docs/rows.md lists the layouts of each.
        path: Path of the file, also with ``.gz``, or of the folder that holds the file of each split.
        split: Split that the file holds. ``"train"`` gives the authors' training examples, of WebNLG those with the
            comment "good", as Li & Liang trained. ``"dev"`` and ``"test"`` give one row for each input, whose texts are
            ``refs``, as evaluation needs them.

    Returns:
        Rows with ``mr``, ``triples`` or ``table``, and ``ref`` or ``refs``, or with ``document``, and ``summary`` or
        ``refs``. Other columns, such as ``category`` and ``id``, ride along.

    Raises:
        ConfigError: If the split is unknown.
        DataError: If the file is malformed, with path and line, or is the official file of another split.

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


def count_warning(task: str, rows: Sequence[Row], split: str) -> str | None:
    """Sentence on rows of a corpus that are not as many as its official file has; None for other tasks."""
    corpus = CORPORA.get(task)
    return None if corpus is None else corpus.count_warning(rows, split)


def other_split(task: str, rows: Sequence[Row], split: str) -> str | None:
    """Sentence on rows of a corpus that are those of another split; None for other rows and tasks."""
    corpus = CORPORA.get(task)
    return None if corpus is None else corpus.other_split(rows, split)
