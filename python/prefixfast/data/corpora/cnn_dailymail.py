"""CNN/DailyMail: stories with ``@highlight``, rows with ``article`` and ``highlights``, and pairs of text files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from prefixfast.data.corpora.article_files import files_by_stem, find_near, listed_items, text_item
from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.summaries import document_row, not_empty, summary_items, text_lines
from prefixfast.data.files import Item, file_kind, read_text
from prefixfast.errors import DataError, printable

STORY, HIGHLIGHT = ".story", "@highlight"
URL_LISTS = {"train": "all_train.txt", "dev": "all_val.txt", "test": "all_test.txt"}
SENTENCE_ENDS = (".", "!", "?", "'", "`", '"', "\u2019", "\u201d", ")")


def cnn_dailymail_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of CNN/DailyMail, from a file, a folder of files by split, or a folder of stories.

    The folder of stories holds the lists of addresses, or their folder ``url_lists``. They may also be beside it.
    """
    if file_kind(path) == STORY:
        yield text_item(path, _article_and_highlights)
        return
    files = files_by_stem(path, [STORY]) if path.is_dir() else {}
    if not files:
        yield from summary_items(path, split, partial(document_row, document="article", summary="highlights"))
        return
    items = listed_items(_stems(path, split), files, path, _article_and_highlights)
    yield from not_empty(items, path) if split == "train" else items


def _stems(folder: Path, split: str) -> list[str]:
    """Stems of the stories of a split, the SHA-1 of each address in its list.

    Raises:
        DataError: If the list is missing, or cannot be read.
    """
    name = URL_LISTS[split]
    path = find_near(folder, name) or find_near(folder, f"url_lists/{name}")
    if path is None:
        msg = (
            f"{printable(str(folder))}: expected url_lists/{name} of abisee/cnn-dailymail beside the stories, got none"
        )
        raise DataError(msg, path=str(folder))
    addresses = (line.strip() for line in text_lines(read_text(path)))
    return [hashlib.sha1(a.encode(), usedforsecurity=False).hexdigest() for a in addresses if a]


def _article_and_highlights(lines: list[str]) -> tuple[str, str] | str:
    """Article and highlights of a story, or a message about what is missing.

    As in the loaders of the corpus, a line without a mark at its end gets `` .``, and highlights are lines.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    is_highlight = False
    for line in filter(None, map(str.strip, lines)):
        if line.startswith(HIGHLIGHT):
            is_highlight = True
        else:
            texts[is_highlight].append(line if HIGHLIGHT in line or line.endswith(SENTENCE_ENDS) else f"{line} .")
    if not texts[1]:
        return f"expected a text after a line {HIGHLIGHT}, got none"
    return " ".join(texts[0]), "\n".join(texts[1])


CNN_DAILYMAIL = Corpus(
    "cnn_dailymail",
    "the repository abisee/cnn-dailymail; artmatsak/cnn-dailymail makes the pairs of text files of BART's authors",
    cnn_dailymail_items,
    {"train": (Counts(287113, 287113),), "dev": (Counts(13368, 13368),), "test": (Counts(11490, 11490),)},
)
