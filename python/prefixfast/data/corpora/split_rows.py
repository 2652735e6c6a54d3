"""Rows of a split: those of files of rows, one for each input outside of training, those with texts in training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.files import FileRow, Item, file_items
from prefixfast.data.formats import FORMATS, FormatName
from prefixfast.data.row_values import references
from prefixfast.data.rows import row_error
from prefixfast.errors import DataError
from prefixfast.io.text import counted

logger = logging.getLogger(__name__)


def row_items(path: Path, key: str) -> Iterator[Item]:
    """Yield the rows of a file that is no official one: rows that have an input key already.

    Args:
        path: Path of the file.
        key: Input key, without which a row is an entry of a damaged official file.
    """
    for item in file_items(path):
        if isinstance(item, DataError) or key in item or "input_ids" in item:
            yield item
        else:
            yield row_error(item, 0, f"expected an official entry, or a row with {key}, got the keys {sorted(item)}")


def join_inputs(items: Iterable[Item], key: str, row_format: FormatName) -> Iterator[Item]:
    """Yield one row for each input, in the order in which the inputs first occur.

    The texts of several rows become ``refs``, in the order of the rows. The other columns are those of the first row.
    Rows without an input stay as they are.

    Args:
        items: Rows, and a `DataError` in place of each malformed one.
        key: Key of the input.
        row_format: Format of the rows, ``"table"`` or ``"document"``.
    """
    groups: list[list[FileRow]] = []
    group_by_input: dict[str, list[FileRow]] = {}
    for item in items:
        if isinstance(item, DataError):
            yield item
            continue
        group: list[FileRow] = []
        if (value := item.get(key)) is not None:
            group = group_by_input.setdefault(value if isinstance(value, str) else json.dumps(value), group)
        if not group:
            groups.append(group)
        group.append(item)
    left_out: dict[str, None] = {}
    for group in groups:
        try:
            yield _joined(group, FORMATS[row_format].targets, row_format, left_out)
        except DataError as e:
            yield e
    if left_out:
        names = ", ".join(left_out)
        logger.info("rows of one input are one row; of the columns %s it has the values of the first row", names)


def own_row(item: Item, split: str) -> Item:
    """The row of a file of rows, or the error of one that has no text in training."""
    if isinstance(item, DataError) or split != "train" or "input_ids" in item:
        return item
    try:
        references(item, 0)
    except DataError as e:
        return e
    return item


def with_texts(items: Iterable[Item], path: Path) -> Iterator[Item]:
    """Yield the rows with texts, which training needs, and log the number of the others.

    Args:
        items: Rows of official entries, and a `DataError` in place of each malformed one.
        path: Path of their file or folder.

    Raises:
        DataError: If there are rows, and none has texts.
    """
    left_out, is_any = 0, False
    for item in items:
        if isinstance(item, FileRow) and "refs" not in item and "ref" not in item:
            left_out += 1
        else:
            is_any = True
            yield item
    if left_out and not is_any:
        msg = f"{path}: expected texts in the train split, got {counted(left_out, 'entry', 'entries')} without texts"
        raise DataError(msg, path=str(path))
    if left_out:
        what = counted(left_out, "entry without texts is", "entries without texts are")
        logger.info("%s: %s left out", path, what)


def _joined(
    rows: list[FileRow], targets: tuple[str, ...], row_format: FormatName, left_out: dict[str, None]
) -> FileRow:
    """The row with the texts of all rows of one input; the columns with several values are added to ``left_out``."""
    first, *more = rows
    if not more:
        return first
    texts: list[JSON] = []
    for row in rows:
        texts += references(row, 0, row_format) if any(row.get(k) is not None for k in targets) else []
        left_out |= dict.fromkeys(k for k, v in row.items() if k not in targets and v != first.get(k))
    others = {k: v for k, v in first.items() if k not in targets}
    return FileRow(others | ({"refs": texts} if texts else {}), first.path, first.line)
