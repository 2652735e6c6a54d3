"""XSum: pairs of text files, rows with ``document`` and ``summary``, and the extracted articles of its authors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from prefixfast.data.corpora.article_files import files_by_stem, find_near, listed_items, text_item
from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.summaries import document_row, not_empty, summary_items
from prefixfast.data.files import Item, file_kind, read_text
from prefixfast.data.files.json_rows import parse_json
from prefixfast.errors import DataError, printable, shown

ENDINGS = (".summary", ".data")  # of the authors' archive, and of their parser of web pages
SPLIT_FILE = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
SPLIT_KEYS = {"train": "train", "dev": "validation", "test": "test"}
MARK = re.compile(r"\[(?:SN|XSUM)\]([A-Z-]+)\[(?:SN|XSUM)\]")
SUMMARY_MARKS, BODY_MARK = ("FIRST-SENTENCE", "INTRODUCTION"), "RESTBODY"
# Lines of web pages that the loaders of the corpus leave out.
WEB_LINES = {
    *("Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp", "Linkedin", "LinkedIn"),
    *("Copy this link", "These are external links and will open in a new window"),
}


def xsum_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of XSum, from a file, a folder of files by split, or a folder of extracted articles.

    The folder of articles holds the files and the authors' list of splits, which may also be beside the folder.
    """
    if file_kind(path) in ENDINGS:
        yield text_item(path, _document_and_summary)
        return
    files = files_by_stem(path, ENDINGS) if path.is_dir() else {}
    if not files:
        yield from summary_items(path, split, partial(document_row, document="document", summary="summary"))
        return
    items = listed_items(_ids(path, split), files, path, _document_and_summary)
    yield from not_empty(items, path) if split == "train" else items


def _ids(folder: Path, split: str) -> list[str]:
    """Identifiers of the articles of a split.

    Raises:
        DataError: If the list of splits is missing or malformed.
    """
    path = find_near(folder, SPLIT_FILE)
    if path is None:
        msg = (
            f"{printable(str(folder))}: expected {SPLIT_FILE} of EdinburghNLP/XSum in the folder or beside it, got none"
        )
        raise DataError(msg, path=str(folder))
    try:
        splits = parse_json(read_text(path))
    except (ValueError, RecursionError) as e:
        msg = f"{path}:{getattr(e, 'lineno', 1)}: expected JSON: {e}"
        raise DataError(msg, path=str(path), line=getattr(e, "lineno", 1)) from e
    ids = splits.get(SPLIT_KEYS[split]) if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
        msg = f"{path}:1: expected a list of strings under {SPLIT_KEYS[split]}, got {shown(ids)}"
        raise DataError(msg, path=str(path), line=1)
    return [str(i) for i in ids]


def _document_and_summary(lines: list[str]) -> tuple[str, str] | str:
    """Document and summary of the sections of an article, or a message about a wrong section."""
    sections: dict[str, list[str]] = {}
    lines_of: list[str] = []
    for line in lines:
        if mark := MARK.fullmatch(line.strip()):
            if mark[1] in sections:
                return f"expected each section once, got {mark[1]} again; does the file hold two articles?"
            lines_of = sections[mark[1]] = []
        elif line.strip() and line not in WEB_LINES:
            lines_of.append(line)
    summary = next((sections[name] for name in SUMMARY_MARKS if name in sections), None)
    if summary is None or BODY_MARK not in sections:
        wanted = f"{' or '.join(SUMMARY_MARKS)} and {BODY_MARK}"
        return (
            f"expected the sections {wanted} in marks such as [SN]{BODY_MARK}[SN], got {', '.join(sections) or 'none'}"
        )
    return "\n".join(sections[BODY_MARK]).strip(), "\n".join(summary).strip()


XSUM = Corpus(
    "xsum",
    "the repository EdinburghNLP/XSum, whose articles are extracted from web pages",
    xsum_items,
    {"train": (Counts(204045, 204045),), "dev": (Counts(11332, 11332),), "test": (Counts(11334, 11334),)},
)
