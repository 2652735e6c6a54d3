"""`write_tensors`, which writes tensors to a file from where they are. torch is imported only to write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and sync one new safetensors file; a crash can leave part of it.

    Contiguous tensors on the CPU are written without a copy of them in memory.

    Args:
        path: Path of the file.
        tensors: Tensors by name. Those that share memory with another one are copied, as the format demands.
    """
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, t in tensors.items():
        found = t.detach().cpu().contiguous()
        storage = found.untyped_storage().data_ptr()
        own[name] = found.clone() if storage in storages else found
        storages.add(storage)
    save_file(own, path)
    with path.open("rb+") as f:
        os.fsync(f.fileno())
