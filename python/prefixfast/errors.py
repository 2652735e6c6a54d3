"""The exceptions that prefixfast raises.

Every one is a `PrefixFastError` and also the built-in exception that fits, so `except ValueError` works where a reader expects it to.
A message says what was expected, what came and what to do. This module imports nothing of ours; the Rust core raises the same classes.
"""

from __future__ import annotations

import os

__all__ = [
    "BaseMismatchError",
    "CapacityError",
    "ConfigError",
    "DataError",
    "PrefixFastError",
    "RequestError",
    "UnknownPrefixError",
]


class PrefixFastError(Exception):
    """The parent of all errors of prefixfast."""


class ConfigError(PrefixFastError, ValueError):
    """An option, a setting or a configuration file is wrong."""


class DataError(PrefixFastError, ValueError):
    """A row of data is wrong.

    Args:
        message: What is wrong and what to do.
        path: The file that holds the row, if it came from one.
        line: The row's line in that file, counted from 1.

    Attributes:
        path: As given, `None` if unknown.
        line: As given, `None` if unknown.
    """

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.line = line

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles with the attributes: errors cross process borders in data loaders."""
        return type(self), self.args, {"path": self.path, "line": self.line}


class BaseMismatchError(PrefixFastError, ValueError):
    """A prefix was made for another base model than the one it is used with."""


class UnknownPrefixError(PrefixFastError, KeyError):
    """No prefix has this name or number."""

    def __str__(self) -> str:
        """The message itself, where `KeyError` would show its repr."""
        return str(self.args[0]) if self.args else ""


class RequestError(PrefixFastError, ValueError):
    """One request is wrong.

    Args:
        message: What is wrong and what to do.
        index: The request's place in its batch, counted from 0.

    Attributes:
        index: As given, `None` if unknown.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles with the attribute."""
        return type(self), self.args, {"index": self.index}


class CapacityError(PrefixFastError, RuntimeError):
    """Something does not fit: a buffer, an arena or a memory estimate."""
