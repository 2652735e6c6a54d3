"""The tokenized data set of a run. Each prefix is tokenized separately, so that an error of its rows is its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefixfast.data.rows import Row
from prefixfast.errors import DataError, shown
from prefixfast.io.progress import Progress
from prefixfast.model.base import Model
from prefixfast.training.examples import Examples, TokenizeOptions, concat_examples, tokenize_rows
from prefixfast.training.inputs import number_in_data


@dataclass(frozen=True)
class Dataset:
    """Tokenized examples of several prefixes.

    Attributes:
        examples: All examples.
        span: First example and end of the examples of each name. Names with the same list of rows share examples.
        counts: Numbers of each name: ``rows``, ``examples``, ``skipped_rows`` and ``truncated_rows``.
        digest: SHA-256 of the examples of each name, in hex digits.
    """

    examples: Examples
    span: dict[str, tuple[int, int]]
    counts: dict[str, dict[str, float]]
    digest: dict[str, str]

    @classmethod
    def empty(cls) -> Dataset:
        """Data set without names, of a group whose rows are all wrong."""
        none = np.empty(0, np.int32)
        zero = np.zeros(1, np.int64)
        return cls(Examples(none, zero, none, np.empty(0, np.int64), zero), {}, {}, {})

    def spans(self, names: Iterable[str]) -> NDArray[np.int64]:
        """First example and end of the examples of ``n`` names, int64 ``[n, 2]``."""
        return np.array([self.span[n] for n in names], np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class NamedRows:
    """Rows that one prefix is trained on.

    Attributes:
        name: Name of the rows, for errors.
        rows: Rows.
        options: Options of tokenization. Prefixes with the same ones, and the same list of rows, share examples.
    """

    name: str
    rows: Sequence[Row]
    options: TokenizeOptions


def build_dataset(
    model: Model,
    rows_by_name: Mapping[str, NamedRows],
    *,
    row_numbers: Mapping[str, Sequence[int]] | None = None,
    failed: dict[str, str] | None = None,
) -> Dataset:
    """Tokenize the rows of every prefix.

    Args:
        model: Base model with its tokenizer.
        rows_by_name: Rows by prefix name.
        row_numbers: Numbers, from 1, of the rows in the whole data by the name of the rows, for errors. None if the
            rows of a prefix are not picked from larger data.
        failed: Dictionary to which the error of a prefix with wrong rows is added. None raises the error.

    Raises:
        DataError: If a row is malformed or too long and ``failed`` is None, or no prefix is left.
    """
    parts: list[Examples] = []
    digests: list[str] = []
    number_of: dict[tuple[object, ...], int] = {}
    found: dict[tuple[int, int], int | str] = {}  # number of the part, or the error, by rows and options
    keys = {name: (id(own.rows), id(own.options)) for name, own in rows_by_name.items()}
    part_of_name: dict[str, int] = {}
    total = sum({keys[name]: len(own.rows) for name, own in rows_by_name.items()}.values())
    with Progress("tokenize", total, "rows") as work:
        for name, own in rows_by_name.items():
            if (key := keys[name]) not in found:
                try:
                    part = tokenize_rows(model, {own.name: own.rows}, own.options)
                except DataError as e:
                    error = number_in_data(e, (row_numbers or {}).get(own.name))
                    if failed is None:
                        raise error from e
                    found[key] = str(error)
                else:
                    digest = _digest(part)
                    found[key] = number = number_of.setdefault((digest, *_counts(part).values()), len(parts))
                    if number == len(parts):
                        parts.append(part)
                        digests.append(digest)
                work.update(len(own.rows))
            known = found[key]
            if isinstance(known, int):
                part_of_name[name] = known
            elif failed is not None:
                failed[name] = known
    if not parts:
        raise none_left(failed or {})
    ends = np.cumsum([len(p.num_targets) for p in parts]).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    return Dataset(
        concat_examples(parts),
        {n: spans[i] for n, i in part_of_name.items()},
        {n: {"rows": len(rows_by_name[n].rows)} | _counts(parts[i]) for n, i in part_of_name.items()},
        {n: digests[i] for n, i in part_of_name.items()},
    )


def none_left(failed: Mapping[str, str]) -> DataError:
    """Error of a run without a name that can be trained.

    Args:
        failed: Error message by name, at least one.
    """
    name, text = next(iter(failed.items()))
    return DataError(f"data: no prefix is left to train; of {shown(name)}: {text}")


def _counts(part: Examples) -> dict[str, float]:
    return {
        "examples": len(part.num_targets),
        "skipped_rows": part.num_skipped,
        "truncated_rows": part.num_truncated,
    }


def _digest(part: Examples) -> str:
    sha = hashlib.sha256()
    arrays = (part.ids, part.lengths, part.num_targets, part.target_at, part.encoder_ids, part.encoder_lengths)
    for array in (a for a in arrays if a is not None):
        sha.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array, "<i8").tobytes())
    return sha.hexdigest()
