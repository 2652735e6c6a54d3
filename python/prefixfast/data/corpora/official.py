"""`Corpus`: where a public corpus is to be had, how its files are read, and how many rows and texts they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefixfast.data.files import Item, file_items
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import DataError
from prefixfast.io.text import counted

TEXT_KEYS = ("ref", "refs", "summary", "summaries")  # keys of target texts in the rows of a corpus


@dataclass(frozen=True)
class Counts:
    """Numbers of a whole official file or folder, as `Corpus.items` yields its rows.

    Attributes:
        rows: Number of rows.
        texts: Number of target texts, 0 for a test split without texts; None where the authors do not give it.
        of: Name of the release or of the part, where a split has several.
        left_out: Number of texts that training leaves out, which the file read as another split has too.
    """

    rows: int
    texts: int | None
    of: str = ""
    left_out: int = 0

    def fits(self, rows: int, texts: int) -> bool:
        """Whether a file has these counts."""
        return self.rows == rows and self.texts in (None, texts)

    def __str__(self) -> str:
        name = f" ({self.of})" if self.of else ""
        texts = "" if self.texts is None else f" with {counted(self.texts, 'text')}"
        return f"{counted(self.rows, 'row')}{texts}{name}"


@dataclass(frozen=True)
class Corpus:
    """A public corpus in the layouts of its authors.

    Attributes:
        name: Name of the task that reads its rows.
        where: Repository or publication from which the files come.
        items: Reader of a file or folder of one split (``"train"``, ``"dev"``, ``"test"``). It yields the rows, and a
            `DataError` in place of each malformed entry. Rows of ``"train"`` are the authors' training examples. Those
            of ``"dev"`` and ``"test"`` are one for each input, with the texts in the order of the file.
        counts: Official counts by split, several where releases or parts differ.
    """

    name: str
    where: str
    items: Callable[[Path, str], Iterator[Item]]
    counts: Mapping[str, tuple[Counts, ...]]

    def count_warning(self, rows: Iterable[Row], split: str) -> str | None:
        """Sentence on counts that no whole official file of the split has; None for counts of one.

        Args:
            rows: Rows that the file gives.
            split: Split of the file.
        """
        official = self.counts.get(split, ())
        num_rows = num_texts = 0
        for row in rows:
            num_rows, num_texts = num_rows + 1, num_texts + _num_texts(row)
        if not official or any(one.fits(num_rows, num_texts) for one in official):
            return None
        nearest = min(official, key=lambda one: abs(one.rows - num_rows) + abs((one.texts or 0) - num_texts))
        found = Counts(num_rows, num_texts)
        return f"the {split} split of {self.name} has {nearest}; got {found}, a part or another release"

    def other_split(self, rows: Iterable[Row], split: str) -> str | None:
        """Sentence on rows with as many texts as an official file that is read otherwise; None for other rows.

        Training files are read otherwise than those of dev and test.

        Args:
            rows: Rows that the file gives.
            split: Split as which the file was read.
        """
        texts = sum(map(_num_texts, rows))
        splits = [
            name
            for name, official in self.counts.items()
            if any(texts and one.texts and texts in (one.texts, one.texts + one.left_out) for one in official)
        ]
        if not splits or split in splits or "train" not in (split, *splits):
            return None  # dev and test are read alike
        return f"expected the {split} split of {self.name}, got {texts} texts, which is its {splits[0]} split"


def _num_texts(row: Row) -> int:
    values = [row.get(key) for key in TEXT_KEYS]
    return sum(len(v) if isinstance(v, list) else int(isinstance(v, str)) for v in values)


def row_items(path: Path, key: str) -> Iterator[Item]:
    """Yield the rows of a file that is no official one: rows that have an input key already.

    Args:
        path: Path of the file.
        key: Input key, without which a row is an entry of a damaged official file.
    """
    for item in file_items(path):
        if isinstance(item, DataError) or key in item or "input_ids" in item:
            yield item
        else:
            yield row_error(item, 0, f"expected an official entry, or a row with {key}, got the keys {sorted(item)}")
