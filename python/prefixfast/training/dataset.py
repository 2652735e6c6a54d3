"""All examples of a run: tokenized prefix by prefix, so that rows that fail are those of one prefix only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefixfast.config import TrainConfig
from prefixfast.data.encode import Examples, tokenize
from prefixfast.data.rows import Row
from prefixfast.data.tasks import Task
from prefixfast.errors import DataError
from prefixfast.model.base import Model


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
