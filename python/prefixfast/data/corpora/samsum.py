"""SAMSum: JSON lists of objects with ``id``, ``dialogue`` and ``summary``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.summaries import document_row, summary_items
from prefixfast.data.files import Item


def samsum_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a file of SAMSum, or of a folder of such files by split."""
    yield from summary_items(path, split, partial(document_row, document="dialogue", summary="summary"))


SAMSUM = Corpus(
    "samsum",
    "the files beside Gliwa et al. 2019, SAMSum Corpus (arXiv:1911.12237)",
    samsum_items,
    {
        "train": (Counts(14731, 14731, "without the empty dialogue"), Counts(14732, 14732)),
        "dev": (Counts(818, 818),),
        "test": (Counts(819, 819),),
    },
)
