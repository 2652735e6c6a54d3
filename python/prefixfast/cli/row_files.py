"""Files of rows on the command line: one file, NAME=FILE, a folder, a glob pattern, or several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefixfast.data.folder import Folder, add_file, file_name, is_pattern
from prefixfast.errors import ConfigError, shown


def named_files(
    words: Sequence[str], *, by_stem: bool = False, official: bool = False
) -> str | Mapping[str, str | Path]:
    """The one file of rows, or the files by name.

    The name of a file in a folder, of a match of a pattern and of one of several files is its stem.

    Args:
        words: Files, folders, glob patterns and NAME=FILE.
        by_stem: Whether one file is given under its stem too.
        official: Whether a folder is one official folder of a corpus, and not a folder of files of rows.

    Raises:
        ConfigError: If one of several files does not exist, so that a shell's pattern has matched nothing.
        DataError: If a folder has no file of rows, or two files have one name.
    """
    if len(words) == 1 and (folder := folder_at(words[0], official=official)) is not None:
        return folder
    if len(words) == 1 and _name(words[0]) is None and not by_stem:
        return words[0]
    found: dict[str, Path] = {}
    for word in words:
        if name := _name(word):
            add_file(found, name, Path(word.partition("=")[2]))
        elif (folder := folder_at(word, official=official)) is not None:
            for stem, file in folder.items():
                add_file(found, stem, file)
        elif len(words) > 1 and not Path(word).exists():
            msg = f"DATA: expected files, folders, patterns or NAME=FILE, got {shown(word)}, which does not exist"
            raise ConfigError(msg)
        else:
            add_file(found, file_name(Path(word)), Path(word))
    return found


def folder_at(path: str | Path, *, official: bool = False) -> Folder | None:
    """The files of a folder or of a glob pattern by name; None for other paths.

    Args:
        path: Path.
        official: Whether a folder is one official folder of a corpus, for which the result is None.
    """
    return Folder(path) if is_pattern(path) or (Path(path).is_dir() and not official) else None


def check_one_file(path: Path, *, official: bool = False) -> None:
    """Check that the file of requests is no folder and no glob pattern, before any work.

    Args:
        path: Path.
        official: Whether a folder is one official folder of a corpus, which is allowed.

    Raises:
        ConfigError: If it is one.
    """
    if is_pattern(path) or (path.is_dir() and not official):
        got = "a folder" if path.is_dir() else "a pattern"
        advice = "put the rows into one file, in which the key 'prefix' of each row names its prefix in --store"
        advice += ", or name the split that the folder of a corpus holds, with --split" if path.is_dir() else ""
        msg = f"IN: expected one file of rows, got {got}, {shown(str(path))}; {advice}"
        raise ConfigError(msg)


def _name(word: str) -> str | None:
    """NAME of a word NAME=FILE, None for other words."""
    name, sep, path = word.partition("=")
    return name if name and sep and path and not Path(word).exists() and not is_pattern(name) else None
