"""Random prefixes for stores, and the files of a store."""

from __future__ import annotations

from pathlib import Path

import torch

from prefixfast import Prefix


def prefix(seed: int = 0, rows: int = 3, **how) -> Prefix:
    """A random prefix of two layers."""
    g = torch.Generator().manual_seed(seed)
    return Prefix(
        {f"self.{i}.{x}": torch.randn(rows, 2, 4, generator=g) for i in range(2) for x in "kv"},
        **{"pos_start": rows, **how},
    )


def files(root: Path) -> dict[str, bytes]:
    """Content of all files of a folder by path."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def cut(path: Path) -> None:
    """Truncate a file by a few bytes."""
    path.write_bytes(path.read_bytes()[:-7])
