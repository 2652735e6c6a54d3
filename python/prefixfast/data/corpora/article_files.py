"""Corpora of one text file for each document, with a list of the documents of each split beside the files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prefixfast.data.corpora.split_files import visible_files
from prefixfast.data.corpora.summaries import text_lines
from prefixfast.data.files import FileRow, Item, file_kind, read_text
from prefixfast.errors import DataError, printable

logger = logging.getLogger(__name__)
Parse = Callable[[list[str]], tuple[str, str] | str]


def files_by_stem(folder: Path, endings: Iterable[str]) -> dict[str, Path]:
    """Files in a folder and the folders in it by their stem.

    Args:
        folder: Folder.
        endings: Suffixes of the files, before ``.gz``.

    Raises:
        DataError: If two files have one stem, of which one would be lost.
    """
    kinds, found = {*endings}, dict[str, Path]()
    for file in visible_files(folder):
        if file_kind(file) not in kinds:
            continue
        if (other := found.setdefault(_stem(file), file)) != file:
            expected = f"expected one file of each document, got {other.relative_to(folder)} too"
            msg = f"{printable(str(file))}: {expected}; give one of the two folders"
            raise DataError(msg, path=str(file))
    return found


def find_near(folder: Path, name: str) -> Path | None:
    """The file of a name in a folder or beside the folder; None without one."""
    places = (folder, folder.resolve().parent)  # the parent of "." is "."
    return next((place / name for place in places if (place / name).is_file()), None)


def listed_items(stems: Iterable[str], files: Mapping[str, Path], folder: Path, parse: Parse) -> Iterator[Item]:
    """Yield the rows of the documents that a split lists, in the order of the list.

    Documents without a file are left out and counted, because crawls of the corpora miss some.

    Args:
        stems: Stems of the files of the split.
        files: Files by their stem.
        folder: Folder of the files, for errors.
        parse: Parser of the lines of a file.
    """
    missing, found = 0, False
    for stem in dict.fromkeys(stems):
        if stem in files:
            found = True
            yield text_item(files[stem], parse)
        else:
            missing += 1
    if not found:
        msg = f"{printable(str(folder))}: expected files of the {missing} documents that the split lists, got none"
        yield DataError(msg, path=str(folder))
    elif missing:
        logger.warning("%s: %d documents that the split lists have no file and are left out", folder, missing)


def text_item(path: Path, parse: Parse) -> Item:
    """The row of a file of one document, with the file's stem as ``id``.

    Args:
        path: Path of the file.
        parse: Function that gives document and summary of the file's lines, or a message about what is missing.
    """
    try:
        found = parse(text_lines(read_text(path)))
    except DataError as e:
        return e
    if isinstance(found, str):
        return DataError(f"{path}:1: {found}", path=str(path), line=1)
    document, summary = found
    return FileRow({"document": document, "summary": summary, "id": _stem(path)}, str(path), 1)


def _stem(path: Path) -> str:
    """A file's name without its suffix and ``.gz``."""
    return path.name[: path.name.lower().rindex(file_kind(path))]
