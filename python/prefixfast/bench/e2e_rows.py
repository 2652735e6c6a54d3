"""Rows of the E2E data set (Novikova et al. 2017) in the order and split of its files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prefixfast.data import read_rows
from prefixfast.errors import ConfigError, shown

Row = dict[str, str]


def read_split(folder: Path, split: str, keys: tuple[str, ...] = ("mr", "ref")) -> list[Row]:
    """Rows of one split.

    Args:
        folder: Folder with one file for each split, whose name contains the split's name, such as
            ``e2e_train.jsonl.gz`` or the official ``trainset.csv``.
        split: ``train``, ``dev`` or ``test``.
        keys: Keys that every row must have.

    Raises:
        ConfigError: If there is no such file, or its rows lack a key.
        DataError: If the file cannot be read.
    """
    files = sorted(p for p in folder.glob("*") if p.is_file() and split in p.name)
    if not files:
        msg = (
            f"E2E: expected a file of {split} rows in {shown(str(folder))}, such as {split}set.csv or "
            f"e2e_{split}.jsonl.gz, "
            "found none; the data set is at https://github.com/tuetschek/e2e-dataset"
        )
        raise ConfigError(msg)
    rows: list[Any] = [dict(row) for row in read_rows(files[0])]
    if missing := [key for key in keys if key not in rows[0]]:
        msg = f"E2E: {files[0]}: expected rows with the keys {', '.join(keys)}, got none with {', '.join(missing)}"
        raise ConfigError(msg)
    return rows


def slots(mr: str) -> list[tuple[str, str]]:
    """Slots of a meaning representation: ``name[Blue Spice], area[riverside]`` has ``("name", "Blue Spice")``, ..."""
    return [(k.strip(), v) for k, v in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", mr)]
