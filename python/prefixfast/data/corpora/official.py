"""`Corpus`: where a public corpus is to be had, how its files are read, and how many rows and texts they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefixfast.data.files import Item
from prefixfast.data.rows import Row
from prefixfast.io.text import counted

TEXT_KEYS = ("ref", "refs", "summary", "summaries")  # keys of target texts in the rows of a corpus


@dataclass(frozen=True)
class Counts:
    """Numbers of a whole official file or folder, as `Corpus.items` yields its rows.

    Attributes:
        rows: Number of rows.
        texts: Number of target texts, 0 for a test split without texts.
        of: Name of the release or of the part, where a split has several.
    """

    rows: int
    texts: int
    of: str = ""

    def __str__(self) -> str:
        name = f" ({self.of})" if self.of else ""
        return f"{counted(self.rows, 'row')} with {counted(self.texts, 'text')}{name}"


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
        found = Counts(0, 0)
        for row in rows:
            found = Counts(found.rows + 1, found.texts + _num_texts(row))
        if not official or any((one.rows, one.texts) == (found.rows, found.texts) for one in official):
            return None
        expected = ", or ".join(map(str, official))
        return f"the {split} split of {self.name} has {expected}; got {found}, a part or another release"

    def other_split(self, rows: Iterable[Row], split: str) -> str | None:
        """Sentence on rows that have as many texts as the official file of another split; None for other rows.

        Args:
            rows: Rows that the file gives.
            split: Split as which the file was read.
        """
        texts = sum(map(_num_texts, rows))
        splits = [name for name, official in self.counts.items() if texts and texts in (one.texts for one in official)]
        if not splits or split in splits:
            return None
        return f"expected the {split} split of {self.name}, got {texts} texts, which is its {splits[0]} split"


def _num_texts(row: Row) -> int:
    values = [row.get(key) for key in TEXT_KEYS]
    return sum(len(v) if isinstance(v, list) else int(isinstance(v, str)) for v in values)
