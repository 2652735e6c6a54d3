"""All examples of a run: tokenized prefix by prefix, so that rows that fail are those of one prefix only."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prefixfast.config import TrainConfig
from prefixfast.data.encode import Example, Ints, encode_examples
from prefixfast.data.rows import Row, row_error
from prefixfast.data.tasks import Task
from prefixfast.errors import DataError
from prefixfast.model.base import Model


@dataclass(frozen=True)
class Examples:
    """Tokenized examples of all prefixes, ragged.

    Attributes:
        ids: int32, example x is ``[indptr[x]:indptr[x + 1]]`` and ends with its last target.
        indptr: int64 ``[X + 1]``.
        targets: int32 ``[X]``: target tokens of each example, at least 1.
        target_at: int64 ``[A]``: places in ``ids`` of the target tokens, ascending; never an example's first token.
        first: int64 ``[n + 1]``: examples of prefix i are ``first[i]`` to ``first[i + 1]``.
        skipped: Rows left out by ``overflow="skip"``.
        truncated: Rows cut by ``overflow="truncate"``.
    """

    ids: Ints
    indptr: NDArray[np.int64]
    targets: Ints
    target_at: NDArray[np.int64]
    first: NDArray[np.int64]
    skipped: int = 0
    truncated: int = 0

    @property
    def lengths(self) -> Ints:
        """int32 ``[X]``."""
        return np.diff(self.indptr).astype(np.int32)

    @cached_property
    def target_indptr(self) -> NDArray[np.int64]:
        """int64 ``[X + 1]``: targets of example x are ``target_at[target_indptr[x]:target_indptr[x + 1]]``."""
        return np.concatenate([[0], np.cumsum(self.targets, dtype=np.int64)])


@dataclass(frozen=True)
class Corpus:
    """Examples of several prefixes.

    Attributes:
        examples: All of them.
        span: By name, first example and the one after the last; names with the same list of rows share them.
        counts: By name: rows, and how many were skipped and truncated.
        digest: By name: SHA-256 of its examples.
    """

    examples: Examples
    span: dict[str, tuple[int, int]]
    counts: dict[str, dict[str, float]]
    digest: dict[str, str]

    def spans(self, names: Iterable[str]) -> NDArray[np.int64]:
        """int64 ``[n, 2]``."""
        return np.array([self.span[n] for n in names], np.int64).reshape(-1, 2)


def collect(
    model: Model,
    rows_of: Mapping[str, Sequence[Row]],
    task: Task,
    config: TrainConfig,
    limit: int,
    *,
    lines: Mapping[str, Sequence[int]] | None = None,
    failed: dict[str, str] | None = None,
) -> Corpus:
    """Tokenize the rows of every prefix; see `tokenize`.

    Args:
        model: For its tokenizer.
        rows_of: Rows by name.
        task: How rows are read.
        config: ``overflow``.
        limit: Longest example in tokens.
        lines: By name, the rows' numbers in the file that they come from.
        failed: Names whose rows are wrong are put there with the error's text and left out; None: they raise.

    Raises:
        DataError: For a malformed or too long row, and if nothing is left.
    """
    parts: list[Examples] = []
    place: dict[int, int] = {}
    used: dict[str, int] = {}
    for name, rows in rows_of.items():
        if id(rows) not in place:
            try:
                part = tokenize(model, {name: rows}, task, config, limit)
            except DataError as e:
                error = _numbered(e, (lines or {}).get(name))
                if failed is None:
                    raise error from e
                failed[name] = str(error)
                continue
            place[id(rows)] = len(parts)
            parts.append(part)
        used[name] = place[id(rows)]
    if not parts:
        name, text = next(iter((failed or {}).items()))
        msg = f"data: no prefix is left to train; of {name!r}: {text}"
        raise DataError(msg)
    ends = np.cumsum([len(p.targets) for p in parts]).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    return Corpus(
        _merged(parts),
        {n: spans[i] for n, i in used.items()},
        {
            n: {
                "examples": len(parts[i].targets),
                "skipped_rows": parts[i].skipped,
                "truncated_rows": parts[i].truncated,
            }
            for n, i in used.items()
        },
        {n: _digest(parts[i]) for n, i in used.items()},
    )


def _merged(parts: list[Examples]) -> Examples:
    first = np.concatenate([[0], np.cumsum([len(p.targets) for p in parts])]).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]), dtype=np.int64)])
    ids, targets = (np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "targets"))
    starts = np.cumsum([0, *(len(p.ids) for p in parts[:-1])])
    at = np.concatenate([p.target_at + start for p, start in zip(parts, starts, strict=True)])
    skipped, truncated = (sum(getattr(p, name) for p in parts) for name in ("skipped", "truncated"))
    return Examples(ids, indptr, targets, at, first, skipped, truncated)


def _digest(part: Examples) -> str:
    sha = hashlib.sha256()
    for array in (part.ids, part.lengths, part.targets, part.target_at):
        sha.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array, "<i8").tobytes())
    return sha.hexdigest()


def _numbered(error: DataError, lines: Sequence[int] | None) -> DataError:
    """The error with the row's number in the whole data, where the prefix's rows were picked from it."""
    if (
        lines is None or error.path is not None or error.line is None or not 0 < error.line <= len(lines)
    ):  # rows of files know their line
        return error
    return DataError(f"{error} (row {lines[error.line - 1]} of the data)", path=error.path, line=lines[error.line - 1])


def tokenize(
    model: Model, rows_of: Mapping[str, Sequence[Row]], task: Task, config: TrainConfig, limit: int
) -> Examples:
    """Tokenize the rows of every prefix.

    Args:
        model: For its tokenizer.
        rows_of: Rows by prefix name, in the order of the prefixes.
        task: How rows are read; rows with ``input_ids`` and ``labels`` (-100: no target) are taken as they are.
        config: ``overflow``.
        limit: Longest example in tokens.

    Raises:
        DataError: For a malformed or too long row, with prefix, and file and line or row number.
    """
    found: list[Example] = []
    first, skipped, truncated = [0], 0, 0
    for name, rows in rows_of.items():
        with _named(name):
            tokenizer = None if "input_ids" in rows[0] else model.require_tokenizer()
            for example in encode_examples(tokenizer, model.vocab_size, rows, task):
                kept = fit(example, limit, config.overflow)
                if kept is None and config.overflow == "error":
                    msg = f"{len(example.ids)} tokens, at most {limit} fit; shorten it, raise max_length, or set overflow='truncate' or 'skip'"
                    raise row_error(rows[example.row], example.row, msg)
                skipped += kept is None
                truncated += kept is not None and kept is not example
                found += [] if kept is None else [kept]
        if len(found) == first[-1]:
            msg = f"prefix {name!r}: no rows are left (overflow={config.overflow!r} left out {skipped})"
            raise DataError(msg)
        first.append(len(found))
    indptr = np.concatenate([[0], np.cumsum([len(e.ids) for e in found], dtype=np.int64)])
    counts = np.array([len(e.targets) for e in found], np.int32)
    target_at = np.concatenate([e.targets for e in found]) + np.repeat(indptr[:-1], counts)
    return Examples(
        np.concatenate([e.ids for e in found]), indptr, counts, target_at, np.array(first, np.int64), skipped, truncated
    )


def fit(example: Example, limit: int, overflow: Literal["error", "truncate", "skip"]) -> Example | None:
    """The example if it has at most ``limit`` tokens, what ``truncate`` leaves of it, or None.

    Cut is the start of the prompt, so far that one token stays before the first target; a text without a prompt loses its end.
    """
    excess = len(example.ids) - limit
    if excess <= 0:
        return example
    if overflow != "truncate":
        return None
    if example.whole:
        targets = example.targets[example.targets < limit]
        return Example(example.ids[:limit], targets, example.row, True) if len(targets) else None
    return Example(example.ids[excess:], example.targets - excess, example.row) if excess < example.targets[0] else None


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of rows say whose rows they are."""
    try:
        yield
    except DataError as e:
        msg = f"prefix {name!r}, {e}"
        raise DataError(msg, path=e.path, line=e.line) from e
