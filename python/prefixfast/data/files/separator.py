"""The separator of a table in a text file, found from its header and its first records."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from prefixfast.data.column_names import folded
from prefixfast.data.files.items import malformed
from prefixfast.data.formats import NAMED_KEYS

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SAMPLE_BYTES = 2**18
SAMPLE_RECORDS = 200
ABSENT = "\x1f"  # separator of a table of one column, in which no character separates


@dataclass(frozen=True)
class _Trial:
    """A separator with which the header has several cells.

    Attributes:
        separator: Separator.
        fitting: Share of the first records that have as many cells as the header.
        known: Number of header cells that are keys of a row format.
    """

    separator: str
    fitting: float
    known: int


def find_separator(raw: bytes, path: str, kind: str) -> str:
    """Separator of a table.

    The header decides, because names of columns rarely contain separators. Where it contains several kinds, the first
    records decide, and then the names of keys.

    Args:
        raw: Content of the file as UTF-8.
        path: Path of the file, for errors.
        kind: Suffix of the file. ``".tsv"`` prefers the tab.

    Returns:
        One of `SEPARATORS`, or a character that separates nothing if the header has one cell.

    Raises:
        DataError: If several separators are equally likely.
    """
    sample = raw[:SAMPLE_BYTES].decode(errors="ignore")
    trials = [t for s in SEPARATORS if (t := _try(sample, s)) is not None]
    if kind == ".tsv" and any(t.separator == "\t" for t in trials):
        return "\t"
    if not trials:
        return next(c for c in map(chr, range(ord(ABSENT), 0, -1)) if c.encode() not in raw and c not in '\n\r"\0')
    best = max((t.fitting, t.known) for t in trials)
    found = [t.separator for t in trials if (t.fitting, t.known) == best]
    if len(found) > 1:
        names = " and ".join(SEPARATORS[s] for s in found)
        message = f"the header can be split at {names}; put each name that contains one of them in double quotes"
        raise malformed(path, 1, message)
    return found[0]


def _try(sample: str, separator: str) -> _Trial | None:
    """Trial of a separator, None if the header has one cell or cannot be read with it."""
    records = _records(sample, separator)
    header = next(records, [])
    if len(header) < 2:
        return None
    counts = [n for n, _ in zip(map(len, records), range(SAMPLE_RECORDS), strict=False)]
    fitting = sum(n == len(header) for n in counts) / len(counts) if counts else 1.0
    return _Trial(separator, fitting, sum(folded(name) in NAMED_KEYS for name in header))


def _records(sample: str, separator: str) -> Iterator[list[str]]:
    """Records that are not blank, up to the first error or the end of the sample."""
    reader = csv.reader(io.StringIO(sample, newline=""), delimiter=separator, strict=True)
    try:
        yield from (cells for cells in reader if any(map(str.strip, cells)))
    except csv.Error:
        return
