"""Damaged variants of the files of a corpus, derived from the bytes of whole ones, and the check of what is read."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixfast.data import TASKS
from prefixfast.errors import DataError

Files = Mapping[str, bytes]
BOM = b"\xef\xbb\xbf"
WHOLE = {  # changes that no text file loses anything by
    "a byte order mark": lambda raw: BOM + raw,
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "a blank line at the end": lambda raw: raw if raw.endswith(b"\n") else raw + b"\n",
}
CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "blank": lambda raw: b" \n\t\n",
    "zeros": lambda raw: b"\0" * len(raw),
    "a zero in the middle": lambda raw: raw[: len(raw) // 2] + b"\0" + raw[len(raw) // 2 :],
    "no UTF-8 in the middle": lambda raw: raw[: len(raw) // 2] + b"\xff\xfe" + raw[len(raw) // 2 :],
    "no UTF-8 at the end": lambda raw: raw + b"\xc3",
    "Latin-1": lambda raw: raw + "\u00e9".encode("latin-1") + raw,
    "two times": lambda raw: raw + raw,
    "backwards": lambda raw: raw[::-1],
    "in upper case": bytes.upper,
    "without quotes": lambda raw: raw.replace(b'"', b""),
    "single quotes": lambda raw: raw.replace(b'"', b"'"),
    "without line breaks": lambda raw: raw.replace(b"\n", b""),
    "two line breaks": lambda raw: raw.replace(b"\n", b"\n\n"),
    "carriage returns": lambda raw: raw.replace(b"\n", b"\r"),
    "without brackets": lambda raw: raw.translate(None, b"[]{}<>"),
    "without colons": lambda raw: raw.replace(b":", b""),
    "without separators": lambda raw: raw.replace(b",", b""),
    "a web page": lambda raw: b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of Git LFS": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "compressed": gzip.compress,
    "an archive": lambda raw: b"PK\x03\x04" + raw,
    "JSON null": lambda raw: b"null",
    "a JSON number": lambda raw: b"1" * 5000,
    "a JSON text": lambda raw: b'"text"',
    "a JSON list of lists": lambda raw: b"[[1], [2]]",
    "deep JSON": lambda raw: b"[" * 20000,
    "an empty JSON list": lambda raw: b"[]",
    "an empty JSON object": lambda raw: b"{}",
}
VALUES = {
    "null": None,
    "a number": 7,
    "a list": [1],
    "an object": {"a": None},
    "half a surrogate pair": "\ud800",
    "true": True,
}


def variants(files: Files, name: str, count: int = 50) -> Iterator[tuple[str, dict[str, bytes], bool]]:
    """Damaged variants of files.

    Args:
        files: Content of all files of a layout by their path in a folder.
        name: File that is damaged.
        count: Number of variants, at most.

    Yields:
        Description, files, and whether all rows must come out as from the whole files.
    """
    found = [(what, raw, True) for what, raw in _applied(WHOLE, files[name])]
    found += [(what, raw, False) for what, raw in _applied(CHANGES, files[name])]
    found += [(what, raw, False) for what, raw in _other_values(files[name])]
    found += [(what, raw, False) for what, raw in _other_lines(files[name])]
    left = count - 1 - len(found)
    found += [(f"cut at {i} of {left}", files[name][: len(files[name]) * i // (left + 1)], False) for i in range(left)]
    yield "missing", {k: v for k, v in files.items() if k != name}, False
    for what, raw, whole in found[: count - 1]:
        yield what, {**files, name: raw}, whole


def _applied(changes: Mapping[str, Callable[[bytes], bytes]], raw: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        raw.decode()
    except UnicodeDecodeError:  # a binary file
        changes = {what: change for what, change in changes.items() if what not in WHOLE}
    for what, change in changes.items():
        yield what, change(raw)


def _other_values(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Other values in the place of the first strings that follow a colon in JSON."""
    places = [m.span(1) for m in re.finditer(rb':\s*("(?:[^"\\]|\\.)*")', raw)][:2]
    for start, end in places:
        for what, value in VALUES.items():
            yield f"{what} at {start}", raw[:start] + json.dumps(value).encode() + raw[end:]


def _other_lines(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """A line less, a line more, and a line that is longer."""
    lines = raw.split(b"\n")
    for i in dict.fromkeys((0, len(lines) // 2, max(0, len(lines) - 2))):
        yield f"without line {i + 1}", b"\n".join(lines[:i] + lines[i + 1 :])
        yield f"line {i + 1} twice", b"\n".join(lines[: i + 1] + lines[i:])
        yield f"line {i + 1} longer", b"\n".join([*lines[:i], lines[i] + b',"x"', *lines[i + 1 :]])


def write_all(folder: Path, files: Files) -> Path:
    """Write files into a new folder."""
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    folder.mkdir(exist_ok=True)
    return folder


def check_read(read: Callable[[], Sequence[Any]], task: str, folder: Path, rows: Sequence[Any] | None) -> bool:
    """Check that damaged files give an error with its place, or rows that the task reads.

    Args:
        read: Reader of the files.
        task: Name of the task.
        folder: Folder of the files, which the place is in.
        rows: Rows that must come out, None where the damage changes them.

    Returns:
        Whether there were rows.
    """
    found, error = [], None
    try:
        found = list(read())
    except DataError as e:
        error = e
    if error is not None:
        assert rows is None, str(error)
        assert str(error.path).startswith(str(folder)), str(error)
        assert str(error).startswith(str(folder)), str(error)
        return False
    assert rows is None or found == list(rows)
    for prompt, targets in TASKS[task].pairs(found, "</s>"):
        assert isinstance(prompt, str)
        assert all(isinstance(target, str) for target in targets)
    return True
