"""Bytes of a file, decompressed within a limit."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from prefixfast.errors import DataError, printable
from prefixfast.io.untrusted import file_size

ALWAYS_READ = 64 * 2**20  # decompressed bytes that every file may have
MOST_EXPANDED = 100  # decompressed bytes for each compressed byte; texts have 3 to 20, gzip can have 1,032
CHUNK = 2**20


def read_bytes(path: Path) -> bytes:
    """Bytes of a file, decompressed if its name ends in ``.gz``.

    Raises:
        DataError: If the file cannot be read, or is a decompression bomb: more than 64 MiB of content, of more than
            100 times the size of the file.
    """
    try:
        size = file_size(path)
        return _decompressed(path, size) if path.suffix.lower() == ".gz" else path.read_bytes()
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as e:
        msg = f"{printable(str(path))}: cannot be read: {e}"
        raise DataError(msg, path=str(path)) from e


def _decompressed(path: Path, size: int) -> bytes:
    limit = max(ALWAYS_READ, MOST_EXPANDED * size)
    found = bytearray()
    with path.open("rb") as file, gzip.open(file) as content:
        while chunk := content.read(CHUNK):
            found += chunk
            if len(found) > min(limit, max(ALWAYS_READ, MOST_EXPANDED * file.tell())):
                msg = (
                    f"{printable(str(path))}: expected at most {MOST_EXPANDED} decompressed bytes for each byte of "
                    f"{size}, got more, as from a decompression bomb; if the file is yours, decompress it yourself"
                )
                raise DataError(msg, path=str(path))
    return bytes(found)
