"""The exceptions that prefixfast raises.

Each of them is a `PrefixFastError` and a built-in exception such as `ValueError`, so ``except ValueError`` catches it.
A message says what was expected, what came and what to do. The Rust core raises the same classes.
"""

from __future__ import annotations

import os
import warnings

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
    """Base class of all errors of prefixfast."""


class ConfigError(PrefixFastError, ValueError):
    """Error of an argument, an option or a configuration file."""


class DataError(PrefixFastError, ValueError):
    """Error of a row of data, or of a file of a prefix.

    Args:
        message: Error message.
        path: File with the error, None if there is none.
        line: Line of the row in that file, from 1, None if unknown.

    Attributes:
        path: File with the error, None if there is none.
        line: Line of the row in that file, from 1, None if unknown.
    """

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.line = line

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the attributes too, since data loaders send errors between processes."""
        return type(self), self.args, {"path": self.path, "line": self.line}


class BaseMismatchError(PrefixFastError, ValueError):
    """Error of a prefix that was made for another base model than the one it is used with."""


class UnknownPrefixError(PrefixFastError, KeyError):
    """Error of a name or number that no prefix has."""

    def __str__(self) -> str:
        """The message; `KeyError` would show its repr."""
        return str(self.args[0]) if self.args else ""


class RequestError(PrefixFastError, ValueError):
    """Error of one request.

    Args:
        message: Error message.
        index: Index of the request in its batch, from 0, None if unknown.

    Attributes:
        index: Index of the request in its batch, from 0, None if unknown.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the attribute too."""
        return type(self), self.args, {"index": self.index}


class CapacityError(PrefixFastError, RuntimeError):
    """Error of a buffer, a KV cache, a queue or a memory limit that is too small."""


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller about a public name of version 0.1.0 that has a new name."""
    warnings.warn(f"{old} was renamed: use {new}", FutureWarning, stacklevel=3)
