"""The exceptions that prefixfast raises.

Each of them is a `PrefixFastError` and a built-in exception such as `ValueError`, so ``except ValueError`` catches it.
A message says what was expected, what came and what to do. The Rust core raises the same classes.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping

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
    """Error of a buffer, a KV cache, a queue or a memory limit that is too small.

    Args:
        message: Error message.
        limit: Name of the limit, such as ``"arena_rows"``, None if it has none.
        needed: Number that exceeds the limit.
        available: Largest possible number.

    Attributes:
        limit: Name of the limit, such as ``"arena_rows"``, None if it has none.
        needed: Number that exceeds the limit, None without one.
        available: Largest possible number, None without one.
    """

    def __init__(
        self, message: str, *, limit: str | None = None, needed: int | None = None, available: int | None = None
    ) -> None:
        super().__init__(message)
        self.limit, self.needed, self.available = limit, needed, available

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the attributes too."""
        return type(self), self.args, vars(self)


# Messages of the limits of the Rust core, by their names.
LIMITS = {
    "decode_rows": "{needed} sequences at a time, expected at most {available}; lower num_beams or "
    "num_return_sequences, or raise max_num_seqs and max_num_batched_tokens",
    "arena_rows": "{needed} rows of the KV cache, expected at most {available}; shorten the prompt, lower "
    "max_new_tokens, num_beams or num_return_sequences, or raise kv_cache_memory",
    "prefix_rows": "{needed} rows of the KV cache for prefixes, expected at most {available}; raise "
    "prefix_memory, or use shorter prefixes",
    "encoder_tokens": "{needed} tokens of the encoder and the decoder's prompt, which one step computes, expected at "
    "most {available}; shorten the text, or raise max_num_batched_tokens",
    "table_entries": "tables of {needed} numbers, expected at most {available}; use fewer prefixes, or lower "
    "max_num_batched_tokens",
    "step_buffer": "a buffer of {available} int32 numbers, expected at least {needed}; make it buffer_len long",
    "sequence_keys": "{needed} tokens and prefix rows of one sequence, expected at most {available}; shorten it",
    "token_prefix_pairs": "{needed} pairs of a token and a prefix in one forward, expected at most {available}; make "
    "the batch smaller",
    "visible_prefix_rows": "{needed} prefix rows of the sequences of one forward, expected at most {available}; make "
    "the batch smaller",
    "packed_keys": "{needed} keys of the sequences of one forward, expected at most {available}; make the batch "
    "smaller",
    "padded_tokens": "{needed} padded tokens in one forward, expected at most {available}; make the batch smaller",
    "token_ids": "{needed} token ids of the texts of one call, expected at most {available}; pass fewer texts at "
    "a time",
}


def capacity_error(limit: str, needed: int, available: int) -> CapacityError:
    """Error of a limit of the Rust core, which calls this function.

    Args:
        limit: Name of the limit, one of `LIMITS`.
        needed: Number that exceeds the limit.
        available: Largest possible number.
    """
    message = LIMITS[limit].format(needed=needed, available=available)
    return CapacityError(message, limit=limit, needed=needed, available=available)


@contextlib.contextmanager
def named_errors(name: str, kind: type[PrefixFastError]) -> Iterator[None]:
    """Context manager that puts a name before the message of an error.

    Args:
        name: Name of what is wrong, with the punctuation behind it.
        kind: Class of the errors. Others pass unchanged.
    """
    try:
        yield
    except kind as e:
        e.args = (f"{name}{e}",)
        raise


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller about a public name of version 0.1.0 that has a new name."""
    warnings.warn(f"{old} was renamed: use {new}", FutureWarning, stacklevel=3)


MAX_SHOWN = 200  # characters of a value in a message


class _ShortRepr(reprlib.Repr):
    """Representation of any value, bounded in time and length; strings keep their characters."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, MAX_SHOWN, MAX_SHOWN
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 8

    def repr_str(self, x: str, level: int) -> str:
        """The string in quotes, as it is but for characters that cannot be printed."""
        text = x if len(x) <= self.maxstring else x[: self.maxstring - 1] + "…"
        quote = '"' if "'" in text and '"' not in text else "'"
        return quote + printable(text) + quote

    def repr_int(self, x: int, level: int) -> str:
        """The digits, or the number of bits of a number that is longer than any option takes."""
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


_SHORT_REPR = _ShortRepr()


def shown(value: object) -> str:
    r"""A value in an error message, in at most about 200 characters.

    Args:
        value: Value. A string is put in quotes and keeps its characters; a long one ends with an ellipsis.

    Example:
        >>> print(shown(r"C:\dir [red] 100% {x}"))
        'C:\dir [red] 100% {x}'
    """
    text = _SHORT_REPR.repr(value)
    return text if isinstance(value, str) or len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def printable(text: str) -> str:
    """A text with an escape in place of each line break and control character."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Question that names the known names most similar to an unknown one, empty if none is similar."""
    close = difflib.get_close_matches(name[:MAX_SHOWN], list(known), n=3) if isinstance(name, str) else []
    return f"did you mean {' or '.join(map(shown, close))}?" if close else ""


def suggestion(name: object, known: Iterable[str], *, listed: int = 10) -> str:
    """End of the error message for an unknown name: the most similar known names, else the first known ones.

    Args:
        name: Unknown name.
        known: Names that exist.
        listed: Largest number of names to list if none is similar.

    Example:
        >>> suggestion("webnlq", ["e2e", "webnlg"])
        "did you mean 'webnlg'?"
    """
    names = list(known)
    if close := did_you_mean(name, names):
        return close
    more = f" and {len(names) - listed} more" if len(names) > listed else ""
    return f"known are {', '.join(map(shown, names[:listed]))}{more}" if names else "there is none"


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold a string, which half a surrogate pair prevents."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ConfigError` for the value of an argument that is none of the allowed strings."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        hint = did_you_mean(value, known)
        expected = " or ".join(map(repr, known)) if len(known) < 3 else f"one of {', '.join(known)}"
        msg = f"{name}: expected {expected}, got {shown(value)}" + (f"; {hint}" if hint else "")
        raise ConfigError(msg)


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` for the value of an argument that is neither true nor false."""
    if not isinstance(value, bool):
        msg = f"{name}: expected True or False, got {shown(value)}"
        raise ConfigError(msg)


def check_mapping(name: str, value: object) -> None:
    """Raise `ConfigError` for the value of an argument that is no mapping."""
    if not isinstance(value, Mapping):
        msg = f"{name}: expected a mapping, got {shown(value)}"
        raise ConfigError(msg)


def check_string(name: str, value: object, expected: str = "a string") -> None:
    """Raise `ConfigError` for the value of an argument that is no string."""
    if not isinstance(value, str):
        msg = f"{name}: expected {expected}, got {shown(value)}"
        raise ConfigError(msg)
