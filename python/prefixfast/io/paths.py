"""Checks of the paths that a user gives: names that a file can have, and outputs that replace no input."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prefixfast.errors import ConfigError, shown

LONGEST_NAME = 255  # bytes of a file's name on common file systems


def as_path(name: str, value: object) -> Path:
    """A path that can be one of a file or folder; the file need not exist.

    Args:
        name: Name of the argument, for the error.
        value: Path as the user gave it.

    Raises:
        ConfigError: If the value is no path, is empty, or has characters that no path has.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    try:
        if isinstance(text, str) and text and "\0" not in text:
            names = os.fsencode(text).split(b"/")
            if max(map(len, names)) <= LONGEST_NAME:
                return Path(text)
    except UnicodeEncodeError:
        pass
    expected = f"a path of names of 1 to {LONGEST_NAME} bytes, without NUL and half of a surrogate pair"
    msg = f"{name}: expected {expected}, got {shown(value if text is None else text)}"
    raise ConfigError(msg)


def check_not_input(name: str, written: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Check that a command replaces none of its own inputs, before any work.

    Args:
        name: Name of the argument of the output, for the error.
        written: Files that the command writes or removes.
        inputs: Paths of the inputs. A path that does not exist is no input.

    Raises:
        ConfigError: If a written file is an input, also under another name, or lies in a folder that is an input.
    """
    # `Path.exists` raises for a long name.
    sources = [Path(path) for path in inputs if os.path.exists(path)]  # noqa: PTH110
    for output in filter(os.path.exists, written):
        for source in sources:
            if output.samefile(source) or source.resolve() in output.resolve().parents:
                msg = f"{name}: {shown(str(output))} is read by this command, which would replace it; give another path"
                raise ConfigError(msg)
