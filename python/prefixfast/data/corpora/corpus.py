"""`Corpus`: where a public corpus is to be had, how its files are read, and how many rows and texts they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixfast.data.corpora.split_files import splits_in
from prefixfast.data.files import FileRow, Item
from prefixfast.data.formats import INPUT_KEYS
from prefixfast.data.rows import Row
from prefixfast.io.text import counted

TEXT_KEYS = ("ref", "refs", "summary", "summaries")  # keys of target texts in the rows of a corpus


@dataclass(frozen=True)
class Counts:
    """Numbers of a whole official file or folder, as `Corpus.items` yields its rows.

    Attributes:
        rows: Number of rows.
        texts: Number of target texts, 0 for a test split without texts; None where the authors do not give it.
        release: Name of the release or of the subset, where a split has several.
        left_out: Number of texts that training leaves out, which the file read as another split has too.
        lang: Language of the texts, as in the column ``lang`` of their rows; empty for English.
    """

    rows: int
    texts: int | None
    release: str = ""
    left_out: int = 0
    lang: str = ""

    def fits(self, rows: int, texts: int) -> bool:
        """Whether a file has these counts."""
        return self.rows == rows and self.texts in (None, texts)

    def has_texts(self, texts: int) -> bool:
        """Whether a file with so many texts is this one, also if it is read as another split."""
        return bool(texts and self.texts) and texts in (self.texts, (self.texts or 0) + self.left_out)

    def __str__(self) -> str:
        name = f" ({self.release})" if self.release else ""
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
        counts: Official counts by split, several where releases or subsets differ.
    """

    name: str
    where: str
    items: Callable[[Path, str], Iterator[Item]]
    counts: Mapping[str, tuple[Counts, ...]]

    def count_warning(self, rows: Sequence[Row], split: str) -> str | None:
        """Sentence on counts that no whole official file of the split has; None for counts of one.

        Args:
            rows: Rows that the file gives.
            split: Split of the file.
        """
        official = self.counts.get(split, ())
        found = Counts(len(rows), _num_texts(rows))
        if not official or any(one.fits(found.rows, found.texts or 0) for one in official):
            return None
        if (other := self._split_of_texts(rows, split)) is not None and not _tell(rows, split):
            return f"got {found} for the {split} split of {self.name}, as many as its {other} split; is it that split?"
        alike = [one for one in official if (one.texts == 0) == (found.texts == 0)] or official
        languages = {row.get("lang") or "" for row in rows}  # of the texts; rows without texts name none
        named = [one for one in alike if found.texts == 0 or one.lang in languages] or alike
        expected = " or ".join(map(str, named))
        return f"the {split} split of {self.name} has {expected}; got {found}, part of the file or another release"

    def other_split(self, rows: Sequence[Row], split: str) -> str | None:
        """Sentence on the rows of an official file that is read otherwise; None for other rows.

        Training files are read otherwise than those of dev and test. A part of a split can have as many texts as
        another split by chance. The rows are those of the other split if they have as many inputs too, if their
        identifiers or the name of their file say so, or if the other split is that of training, the largest.

        Args:
            rows: Rows that the file gives.
            split: Split as which the file was read.
        """
        if (other := self._split_of_texts(rows, split)) is None:
            return None
        texts, inputs = _num_texts(rows), _num_inputs(rows)
        releases = [one for one in self.counts[other] if one.has_texts(texts)]
        has_inputs = any(one.rows <= inputs <= one.rows + one.left_out for one in releases)
        if other != "train" and not (has_inputs and inputs != texts) and not _tell(rows, other):
            return None
        return f"expected the {split} split of {self.name}, got {counted(texts, 'text')}, which is its {other} split"

    def _split_of_texts(self, rows: Sequence[Row], split: str) -> str | None:
        """Another split that is read otherwise and has as many texts; None where the split itself has as many."""
        texts = _num_texts(rows)
        splits = [name for name, official in self.counts.items() if any(one.has_texts(texts) for one in official)]
        is_other = splits and split not in splits and "train" in (split, *splits)  # dev and test are read alike
        return splits[0] if is_other else None


def _num_texts(rows: Iterable[Row]) -> int:
    values = [row.get(key) for row in rows for key in TEXT_KEYS]
    return sum(len(v) if isinstance(v, list) else int(isinstance(v, str)) for v in values)


def _num_inputs(rows: Iterable[Row]) -> int:
    """Number of inputs, of which rows with one text each can have the same."""
    inputs = [None if "refs" in row else next((str(row[k]) for k in INPUT_KEYS if k in row), None) for row in rows]
    return inputs.count(None) + len({*inputs} - {None})


def _tell(rows: Iterable[Row], split: str) -> bool:
    """Whether identifiers such as ``dev_12``, or the names of the files, are those of one split."""
    named = [(row.path if isinstance(row, FileRow) else "", row.get("id"), row.get("fname")) for row in rows]
    return any(
        {*column} != {None} and all(splits_in(Path(str(n)).name) == {split} for n in {*column})
        for column in zip(*named, strict=True)
    )
