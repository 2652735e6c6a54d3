"""Receipts of deletions in words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixfast.cli.output import in_bytes, printable
from prefixfast.io.text import counted


def receipt_lines(receipts: Sequence[dict[str, Any]], store: Path) -> list[str]:
    """Lines on what was deleted, what was left, and a command that searches the rest.

    Args:
        receipts: Fields of the `Receipt` of each name, and the name under ``"name"``.
        store: Folder of the store.
    """
    lines = [line for receipt in receipts for line in _lines(receipt)]
    digests = [digest for receipt in receipts for digest in receipt["digests"] if digest]
    if receipts:
        lines += [
            f"searched: {printable(str(store))} with the checkpoints and logs of its training runs",
            "not searched: output folders of training (-o), exports, backups, memory of running engines",
        ]
    if digests:
        place = shlex.quote(printable(str(store)))
        lines.append(f"to search a folder: prefixfast prefixes verify {place} --absent {digests[-1]} --also FOLDER")
    return lines


def _lines(receipt: dict[str, Any]) -> list[str]:
    """Lines on what was deleted of one name."""
    versions, checkpoints = len(receipt["digests"]), receipt["checkpoints"]
    parts = [counted(versions, "version"), counted(receipt["files"], "file"), in_bytes(receipt["bytes"])]
    rows = f", and its rows in {counted(checkpoints, 'checkpoint')} of unfinished training" if checkpoints else ""
    name = printable(receipt["name"])
    lines = [f"{name}: deleted {', '.join(parts)}{rows}"]
    lines += [f"  digest {digest}" for digest in receipt["digests"] if digest]
    for run in receipt["running"]:
        lines.append(f"{name}: a running process trains it ({run}) and will store it; stop it and delete again")
    return lines
