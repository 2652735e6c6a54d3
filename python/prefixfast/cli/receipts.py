"""Receipts of deletions in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixfast.cli.output import in_bytes, printable


def receipt_lines(receipts: Sequence[dict[str, Any]], store: Path) -> list[str]:
    """What was deleted, what was left, and how the rest is searched.

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
        command = f"prefixfast prefixes verify {printable(str(store))} --absent {digests[-1]} --also FOLDER"
        lines.append(f"to search a folder: {command}")
    return lines


def _lines(receipt: dict[str, Any]) -> list[str]:
    """What was deleted of one name."""
    versions, checkpoints = len(receipt["digests"]), receipt["checkpoints"]
    parts = [_counted(versions, "version"), _counted(receipt["files"], "file"), in_bytes(receipt["bytes"])]
    rows = f", and its rows in {_counted(checkpoints, 'checkpoint')} of unfinished training" if checkpoints else ""
    name = printable(receipt["name"])
    lines = [f"{name}: deleted {', '.join(parts)}{rows}"]
    lines += [f"  digest {digest}" for digest in receipt["digests"] if digest]
    for run in receipt["running"]:
        lines.append(f"{name}: a running process trains it ({run}) and will store it; stop it and delete again")
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
