"""Kinds of files that are not read, found by suffix or first bytes, and the advice for each."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

SPREADSHEET = "a spreadsheet; save its sheet as CSV UTF-8 and give that .csv file"
DOCUMENT = "a document; copy its texts into a .csv or .jsonl file with one row for each text"
ARROW = "an Arrow file; write it as .parquet, for example with datasets: Dataset.from_file(PATH).to_parquet(NEW)"
PACKED = "a compressed file or an archive; unpack it first (of these .gz alone is read)"
PICKLE = "a pickle, which can run code; write its rows as .parquet or .jsonl"
DATABASE = "a database; export the table as .csv"
LFS_POINTER = "a pointer of Git LFS instead of the file; fetch the file with: git lfs pull"
WEB_PAGE = "a web page instead of the file; download the raw file"
PLAIN_TEXT = (
    "plain text without columns; name a table with a header .csv or .tsv, or write one text a line as "
    '{"text": "..."} into a .jsonl file'
)
CORPUS = "a file of a public corpus; name its split (--split test), and in training its task too (--task {})"
CORPUS_BY_SUFFIX = {".xml": "webnlg", ".source": "xsum", ".target": "xsum", ".story": "cnn_dailymail"}
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
ADVICE_BY_SUFFIX = {
    **dict.fromkeys(SPREADSHEETS, SPREADSHEET),
    **dict.fromkeys((".txt", ".text", ".md"), PLAIN_TEXT),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pdf", ".html", ".htm"), DOCUMENT),
    **dict.fromkeys((".arrow", ".feather"), ARROW),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz"), PACKED),
    **{suffix: CORPUS.format(task) for suffix, task in CORPUS_BY_SUFFIX.items()},
    **dict.fromkeys((".pkl", ".pickle"), PICKLE),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), DATABASE),
}
ADVICE_BY_START = {
    b"\xd0\xcf\x11\xe0": SPREADSHEET,  # Office files before 2007
    b"%PDF-": DOCUMENT,
    b"ARROW1": ARROW,
    b"BZh": PACKED,
    b"\xfd7zXZ\0": PACKED,
    b"\x28\xb5\x2f\xfd": PACKED,  # Zstandard
    b"7z\xbc\xaf\x27\x1c": PACKED,
    b"Rar!": PACKED,
    b"SQLite format 3\0": DATABASE,
    b"version https://git-lfs": LFS_POINTER,
}
ZIP, GZIP, PARQUET = b"PK\x03\x04", b"\x1f\x8b", b"PAR1"
ADVICE_BY_MEMBER = {"xl/": SPREADSHEET, "content.xml": SPREADSHEET, "word/": DOCUMENT}  # of files that are a zip inside
HTML = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
JSON_TABLE = re.compile(rb'\s*(\[\s*)?\{\s*"')  # the start of rows in JSON


def refused_suffix(suffix: str) -> str | None:
    """Description and advice for a suffix that is not read, None for other suffixes."""
    return ADVICE_BY_SUFFIX.get(suffix)


def refused_content(raw: bytes, path: Path, kind: str) -> str | None:
    """Description and advice for content that does not fit the suffix of its file, None for content that can fit.

    Args:
        raw: Content of the file, decompressed if its name ends in ``.gz``.
        path: Path of the file.
        kind: Suffix that chooses the reader, for example ``".csv"``.
    """
    for start, advice in ADVICE_BY_START.items():
        if raw.startswith(start):
            return advice
    if raw.startswith(ZIP):
        return _zip_advice(raw)
    if raw.startswith(GZIP):
        return f"gzip-compressed; name it {path.name}.gz"
    if raw.startswith(PARQUET) and kind != ".parquet":
        return "a Parquet file; name it .parquet"
    if HTML.match(raw):
        return WEB_PAGE
    if kind in (".csv", ".tsv") and JSON_TABLE.match(raw):
        return "JSON; name it .json or .jsonl"
    return None


def _zip_advice(raw: bytes) -> str:
    """Advice for a zip file by the names of its members; office documents are zip files."""
    try:
        members = zipfile.ZipFile(io.BytesIO(raw)).namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        members = []
    found = (a for start, a in ADVICE_BY_MEMBER.items() if any(m.startswith(start) for m in members))
    return next(found, PACKED)
