"""`Folder`, the files of rows in a folder by name, and the names that files of rows give to prefixes."""

from __future__ import annotations

import glob
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from prefixfast.data.files import ENDINGS, SPREADSHEETS, SUFFIXES
from prefixfast.errors import DataError, is_text, printable, shown
from prefixfast.io.paths import as_path

logger = logging.getLogger(__name__)
SHOWN = 10  # files in a message
HIDDEN, FOLDER, NO_ROWS, NO_TEXT = "hidden", "a folder", "no file of rows", "its name is not UTF-8"


class Folder(Mapping[str, Path]):
    """Mapping of names to the files of rows in a folder, or to those that a glob pattern matches.

    The name of a file is its stem, without the suffixes of its format: ``ann`` for ``ann.jsonl.gz``. `train` of a
    folder trains one prefix for each file. The files are listed once, when the object is made. Files in folders inside
    the folder are left out, as are hidden files and files of other formats; one logged line names them.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("bob.csv", "ann.csv", "notes.md"):
        ...     _ = (folder / name).write_text("prompt,completion")
        >>> users = Folder(folder)
        >>> list(users), users["ann"].name, users.skipped
        (['ann', 'bob'], 'ann.csv', {'notes.md': 'no file of rows'})
        >>> list(Folder(folder / "b*.csv"))
        ['bob']

    Args:
        path: Folder, or a glob pattern of files such as ``users/*.csv``, in which ``**`` stands for any folders.

    Attributes:
        path: Folder or pattern.
        skipped: Reason by file name, for what the folder or the pattern holds beside files of rows.

    Raises:
        ConfigError: If the path cannot be one of a folder.
        DataError: If there is no such folder, it cannot be read, it has no file of rows, or two files have one name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = as_path("folder", path)
        self.skipped: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in _listed(self.path):
            if (reason := _no_rows(file)) is None:
                add_file(self._files, file_name(file), file)
            else:
                self.skipped[file.name] = reason
        left_out = _some(self.skipped)
        if not self._files:
            found = f"got none; left out: {left_out}" if left_out else "got none"
            msg = f"{printable(str(self.path))}: expected files of rows ending in {ENDINGS}, {found}"
            raise DataError(msg, path=str(self.path))
        self._files = dict(sorted(self._files.items()))
        if left_out:
            logger.warning("%s: left out: %s", printable(str(self.path)), left_out)

    def __repr__(self) -> str:
        """One line with the path and the number of files."""
        return f"Folder({shown(str(self.path))}, {len(self._files)} files)"

    def __getitem__(self, name: str) -> Path:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a glob pattern and not an existing file or folder."""
    text = os.fspath(path)
    return glob.has_magic(text) and not os.path.lexists(text)


def file_name(file: Path) -> str:
    """Name of a file of rows: the file's name without the suffixes of its format.

    macOS keeps accents as separate characters in the names of files. They are joined, as keyboards write them, so that
    the name is the one that a user types.
    """
    return unicodedata.normalize("NFC", _stem(file.name))


def add_file(files: dict[str, Path], name: str, file: Path) -> None:
    """Add a file to a mapping of names to files.

    Raises:
        DataError: If the name has another file already, with both.
    """
    other = files.setdefault(name, file)
    if other != file:
        both = f"{printable(str(other))} and {printable(str(file))}"
        msg = f"{both} have one name, {shown(name)}; rename one of them, so that each prefix has a name of its own"
        raise DataError(msg, path=str(file))


def folder_hint(path: str | os.PathLike[str]) -> str | None:
    """Sentence for a folder or a glob pattern that was given in place of one file of rows; None for other paths."""
    got = "a glob pattern" if is_pattern(path) else "a folder" if Path(path).is_dir() else None
    if got is None:
        return None
    advice = "give one file, or train one prefix for each file with prefixfast.Folder(path)"
    return f"{printable(os.fspath(path))}: expected one file of rows, got {got}; {advice}"


def _listed(path: Path) -> list[Path]:
    """Entries of a folder, or matches of a pattern, by name."""
    if is_pattern(path):
        if found := sorted(map(Path, glob.glob(str(path), recursive=True))):  # noqa: PTH207 - Path.glob takes no absolute pattern
            return found
        msg = f"{printable(str(path))}: no file matches this pattern"
        raise DataError(msg, path=str(path))
    try:
        return sorted(path.iterdir())
    except NotADirectoryError as e:
        msg = f"{printable(str(path))}: expected a folder or a glob pattern, got a file; give the file without Folder"
        raise DataError(msg, path=str(path)) from e
    except OSError as e:
        reason = "there is no such folder" if isinstance(e, FileNotFoundError) else f"cannot be read: {e.strerror}"
        msg = f"{printable(str(path))}: expected a folder of files of rows; {reason}"
        raise DataError(msg, path=str(path)) from e


def _no_rows(file: Path) -> str | None:
    """Reason why an entry of a folder is left out; None for a file of rows, also one that cannot be read."""
    if file.name.startswith("."):
        return HIDDEN
    if file.is_dir():
        return FOLDER
    if not is_text(file.name):
        return NO_TEXT
    if _stem(file.name) != file.name:
        return None
    advice = "; save its sheet as .csv" if file.suffix.lower() in SPREADSHEETS else ""
    return NO_ROWS + advice


def _stem(name: str) -> str:
    """A file's name without the suffix of a format of rows and ``.gz``; the whole name without such a suffix."""
    inner = name[: -len(".gz")] if name.lower().endswith(".gz") else name
    kind = Path(inner).suffix
    return inner[: -len(kind)] if kind.lower() in SUFFIXES else name


def _some(skipped: Mapping[str, str]) -> str:
    """The first entries that are left out, with the reasons."""
    named = [f"{printable(name)} ({reason})" for name, reason in list(skipped.items())[:SHOWN]]
    more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return ", ".join(named) + more
