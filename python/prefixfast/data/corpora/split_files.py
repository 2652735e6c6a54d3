"""The files of one split in a folder of a corpus."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from prefixfast.errors import DataError, printable

logger = logging.getLogger(__name__)
WORDS = re.compile(r"[^a-z]+")
NAMES = {"train": ("train", "training"), "dev": ("dev", "valid", "validation"), "test": ("test", "testdata")}


def split_files(folder: Path, split: str, endings: tuple[str, ...]) -> list[Path]:
    """Files of a split in a folder and the folders in it, sorted by path.

    A folder inside that has the split's name is read in place of the whole. A file whose name has the name of another
    split, such as ``1triples_Airport_dev.xml`` in training, is left out.

    Args:
        folder: Folder.
        split: Split.
        endings: Endings of the files.

    Raises:
        DataError: If no file is left.
    """
    inner = next((folder / name for name in NAMES[split] if (folder / name).is_dir()), folder)
    try:
        every = sorted(p for p in inner.rglob("*") if p.name.lower().endswith(endings) and p.is_file())
    except OSError as e:
        msg = f"{printable(str(folder))}: cannot be read: {e}"
        raise DataError(msg, path=str(folder)) from e
    others = {name for other, names in NAMES.items() if other != split for name in names}
    found = [p for p in every if not others.intersection(WORDS.split(p.name.lower()))]
    if not found:
        got = f"{len(every)} files of other splits" if every else "none"
        expected = f"files of the split {split} ending in {' or '.join(endings)}"
        msg = f"{printable(str(folder))}: expected {expected}, got {got}"
        raise DataError(msg, path=str(folder))
    if len(found) < len(every):
        logger.info("%s: %d files of other splits are left out", folder, len(every) - len(found))
    return found
