"""Checks of the paths that a user gives."""

from __future__ import annotations

import os
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
