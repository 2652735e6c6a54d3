"""Bytes of a file, decompressed within a limit."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from prefixfast.errors import DataError, printable
from prefixfast.io.untrusted import file_size

ALWAYS_READ = 64 * 2**20  # bytes or cells that every file may have
MOST_EXPANDED = 100  # bytes or cells for each compressed byte; texts have 3 to 20, gzip can have 1,032
CHUNK = 2**20


def read_bytes(path: Path) -> bytes:
    """Bytes of a file, decompressed if its name ends in ``.gz``.

    Raises:
        DataError: If the file cannot be read, or is a decompression bomb: more than 64 MiB of content, of more than
            100 times the size of the file.
    """
    try:
        file_size(path, printable(str(path)))
        return _decompressed(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as e:
        msg = f"{printable(str(path))}: cannot be read: {e}"
        raise DataError(msg, path=str(path)) from e


def check_expansion(name: str, size: int, expanded: int, unit: str) -> None:
    """Refuse a small file with a large content, which fills the memory.

    Args:
        name: Name of the file, for the error.
        size: Size of the file, or of its part that is read so far, in bytes.
        expanded: Number of units of content.
        unit: Noun of the units.

    Raises:
        DataError: If the content is a decompression bomb.
    """
    if expanded <= max(ALWAYS_READ, MOST_EXPANDED * size):
        return
    advice = "if the file is yours, decompress it or split it"
    expected = f"at most {MOST_EXPANDED} {unit} for each of {size} compressed bytes"
    msg = f"{printable(name)}: expected {expected}, got more, as from a decompression bomb; {advice}"
    raise DataError(msg, path=name)


def _decompressed(path: Path) -> bytes:
    found = bytearray()
    with path.open("rb") as file, gzip.open(file) as content:
        while chunk := content.read(CHUNK):
            found += chunk
            check_expansion(str(path), file.tell(), len(found), "bytes")
    return bytes(found)
