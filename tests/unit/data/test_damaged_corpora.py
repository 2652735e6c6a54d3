"""Damaged variants of every layout: each gives the right rows or an error with its place, and nothing else."""

from __future__ import annotations

import codecs

import pytest

from damaged_files import damaged
from prefixfast import DataError
from prefixfast.data import TASKS, read_task
from prefixfast.data.corpora import task_items
from table_corpora import LAYOUTS, Layout


def outcome(layout: Layout, path) -> list[dict] | list[DataError]:
    """The rows of a file, or its errors."""
    try:
        items = list(task_items(layout.task, path, layout.split))
    except DataError as e:  # of the whole file
        items = [e]
    errors = [i for i in items if isinstance(i, DataError)]
    for error in errors:
        assert str(error).startswith(str(path)), error
        assert str(error.path) == str(path)
        assert error.line is None or str(error).startswith(f"{path}:{error.line}: "), error
    return errors or items


def check_rows(layout: Layout, rows: list[dict], name: str) -> None:
    """Rows have the types of rows, and each becomes a prompt and targets or an error with its line."""
    for row in rows:
        assert set(row) <= {
            "mr",
            "ref",
            "refs",
            "triples",
            "table",
            "category",
            "subset",
            "id",
            "shape",
            "lang",
            "source",
        }
        texts = [*row.get("refs", []), *([row["ref"]] if "ref" in row else [])]
        assert all(isinstance(t, str) and t for t in texts), name
        assert "refs" not in row or row["refs"], name
        error = refusal(layout.task, row)
        assert error is None or (error.path, error.line) == (row.path, row.line), name


def refusal(task: str, row: dict) -> DataError | None:
    """The error of a row whose content is damaged, None for a row that becomes a prompt."""
    try:
        TASKS[task].prompts([row], None)
    except DataError as e:
        return e
    return None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_damaged_variants(tmp_path, layout):
    variants = damaged(layout.name, layout.text)
    assert len(variants) >= 50
    path = tmp_path / layout.name
    refused = 0
    for name, raw in variants.items():
        path.write_bytes(raw)
        found = outcome(layout, path)
        if found and not isinstance(found[0], DataError):
            check_rows(layout, found, name)
        else:
            refused += 1
    assert refused >= 25, "most damage shows"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_forms_of_the_same_text(tmp_path, layout):
    path = tmp_path / layout.name
    forms = {
        "byte order mark": codecs.BOM_UTF8 + layout.text.encode(),
        "line ends of Windows": layout.text.replace("\r\n", "\n").replace("\n", "\r\n").encode(),
        "UTF-16": codecs.BOM_UTF16_LE + layout.text.encode("utf-16-le"),
        "UTF-16, big-endian": codecs.BOM_UTF16_BE + layout.text.encode("utf-16-be"),
        "empty lines at the end": (layout.text + "\n\n").encode(),
    }
    for name, raw in forms.items():
        path.write_bytes(raw)
        assert read_task(layout.task, path, layout.split) == layout.rows, name
