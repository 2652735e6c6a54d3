"""The files of one split of a corpus in a folder, and the splits that names of files tell."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from prefixfast.data.column_names import listed
from prefixfast.data.files import file_kind
from prefixfast.errors import DataError, printable

logger = logging.getLogger(__name__)
SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "dev": ("dev", "val", "valid", "validation", "devset"),
    "test": ("test", "testdata", "testset"),
}
WITH_TEXTS = "refs"  # word of a test file with texts beside one without them, such as testset_w_refs.csv
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")  # in the name of a part of a split, as Hugging Face exports it
SHOWN = 8  # files in a message


def splits_in(name: str) -> set[str]:
    """Splits whose words a name has, for example ``{"dev"}`` for ``dart-v1.1.1-full-dev.json``."""
    words = _words(name)
    return {split for split, own in SPLIT_WORDS.items() if not words.isdisjoint(own)}


def visible_files(folder: Path) -> list[Path]:
    """Files in a folder and the folders in it, sorted by path.

    Hidden files and folders are left out. Archives of macOS hold a hidden file ``._NAME`` beside each file.

    Raises:
        DataError: If a folder cannot be read.
    """
    found: list[Path] = []
    try:
        for place, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += (Path(place, name) for name in names if not name.startswith("."))
    except OSError as e:
        msg = f"{printable(str(folder))}: cannot be read: {e}"
        raise DataError(msg, path=str(folder)) from e
    return sorted(found)


def split_files(folder: Path, split: str, endings: tuple[str, ...]) -> list[Path]:
    """All files of a split in a folder and the folders in it, sorted by path.

    The name of a file, or else of the innermost folder that names a split, tells the split of the file. A file that
    names none belongs to every split.

    Args:
        folder: Folder.
        split: Split.
        endings: Suffixes of the files, before ``.gz``.

    Raises:
        DataError: If there is no such file.
    """
    every = _files(folder, endings)
    found = [f for f in every if _splits_of(f, folder) <= {split}]
    if not found:
        got = f"{len(every)} files of other splits" if every else "none"
        msg = f"{printable(str(folder))}: expected files of the split {split} ending in {_either(endings)}, got {got}"
        raise DataError(msg, path=str(folder))
    if len(found) < len(every):
        logger.info("%s: %d files of other splits are left out", folder, len(every) - len(found))
    return found


def split_file(path: Path, split: str, *endings: tuple[str, ...]) -> list[Path]:
    """The one file of a split, or all its numbered parts, in a folder; another path as it is.

    The files that are nearest to the folder count. Of a test split with and without texts, the file with texts counts.

    Args:
        path: Folder, or path of a file.
        split: Split, whose word stands in the name of its file, or in that of a folder inside the folder.
        endings: Suffixes of the files, before ``.gz``. The first group of suffixes with a file counts.

    Raises:
        DataError: If there is no such file, there are several, or a numbered part is missing.
    """
    if not path.is_dir():
        return [path]
    every = _files(path, [kind for group in endings for kind in group])
    of_split = [f for f in every if _splits_of(f, path) == {split}]
    for group in endings:
        named = [f for f in of_split if file_kind(f) in group]
        if not named:
            continue
        nearest = min(len(f.parts) for f in named)
        parts: dict[Path, list[Path]] = defaultdict(list)
        for file in named:
            if len(file.parts) == nearest:
                parts[file.with_name(SHARD.sub("", file.name))].append(file)
        with_texts = [files for name, files in parts.items() if WITH_TEXTS in _words(name.name)]
        found = with_texts if len(with_texts) == 1 else [*parts.values()]
        if len(found) == 1:
            return _all_parts(path, found[0])
        of_split = [f for files in found for f in files]
        break
    shown = [str(f.relative_to(path)) for f in (of_split or every)[:SHOWN]]
    words = _either(SPLIT_WORDS[split])
    kinds = _either([kind for group in endings for kind in group])
    expected = f"expected one file of the {split} split, with {words} in its name, ending in {kinds}"
    msg = f"{printable(str(path))}: {expected}; got {listed(shown) if shown else 'no file with such an ending'}"
    raise DataError(msg, path=str(path))


def _all_parts(folder: Path, files: list[Path]) -> list[Path]:
    """The parts of one file, in the order of their numbers.

    Raises:
        DataError: If a part is missing, or the whole file stands beside its parts.
    """
    numbers = [tuple(map(int, mark.groups())) if (mark := SHARD.search(f.name)) else None for f in files]
    if numbers == [None] or numbers == [(i, len(files)) for i in range(len(files))]:
        return files
    expected = "expected one file, or all parts of one by their numbers"
    msg = f"{printable(str(folder))}: {expected}, got {listed([f.name for f in files[:SHOWN]])}; fetch what is missing"
    raise DataError(msg, path=str(folder))


def _files(folder: Path, endings: Iterable[str]) -> list[Path]:
    kinds = {*endings}
    return [f for f in visible_files(folder) if file_kind(f) in kinds and f.is_file()]


def _splits_of(file: Path, folder: Path) -> set[str]:
    """Splits that the name of a file tells, or else the name of the innermost folder that tells any."""
    return next(filter(None, map(splits_in, reversed(file.relative_to(folder).parts))), set())


def _words(name: str) -> set[str]:
    return {*re.split(r"[^a-z]+", name.lower())}


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _raise(error: OSError) -> None:
    raise error
