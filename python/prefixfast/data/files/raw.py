"""Bytes of a file, decompressed within a limit."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from prefixfast.errors import DataError, printable
from prefixfast.io.untrusted import file_size

ALWAYS_READ = 64 * 2**20  # bytes that every file may have
MOST_EXPANDED = 100  # bytes for each compressed byte; texts have 3 to 20, gzip can have 1,032
# Bytes that count for what is more in memory than its bytes of text. An object of Python has about 50 to 500.
ROW_BYTES = 64
CELL_BYTES = 16
ELEMENT_BYTES = 64
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


@dataclass
class Expansion:
    """Content of a file so far, which is refused if it is that of a decompression bomb and would fill the memory.

    Attributes:
        name: Name of the file, for the error.
        size: Size of the file, or of its part that is read so far, in bytes.
        content: Size of the content so far, in bytes.
    """

    name: str
    size: int
    content: int = 0

    @classmethod
    def of_file(cls, path: Path) -> Expansion:
        """Expansion of a whole file, before any of its content."""
        return cls(str(path), path.stat().st_size)

    def add(self, content: int) -> None:
        """Count further content.

        Args:
            content: Size in bytes.

        Raises:
            DataError: If a small file has a large content.
        """
        self.content += content
        if self.content <= max(ALWAYS_READ, MOST_EXPANDED * self.size):
            return
        advice = "if the file is yours, decompress it or split it"
        expected = f"at most {MOST_EXPANDED} bytes for each of {self.size} compressed bytes"
        msg = f"{printable(self.name)}: expected {expected}, got more, as from a decompression bomb; {advice}"
        raise DataError(msg, path=self.name)


def _decompressed(path: Path) -> bytes:
    found, expansion = bytearray(), Expansion(str(path), 0)
    with path.open("rb") as file, gzip.open(file) as content:
        while chunk := content.read(CHUNK):
            found += chunk
            expansion.size = file.tell()
            expansion.add(len(chunk))
    return bytes(found)
