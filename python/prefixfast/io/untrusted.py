"""Readers of JSON and safetensors from untrusted files; every fault is a `DataError` that names the file.

torch is imported only to read tensors.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 16 MiB.

    Raises:
        DataError: If the file is missing, unreadable or too large, or does not hold a JSON object.
    """
    try:
        if (size := file_size(path)) > MAX_JSON_BYTES:
            msg = f"{path.name}: expected at most {MAX_JSON_BYTES} bytes of JSON, got {size}"
            raise DataError(msg, path=str(path))
        value = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as e:
        msg = f"{path.name} is missing; expected a prefix or PEFT adapter folder"
        raise DataError(msg, path=str(path)) from e
    except OSError as e:
        msg = f"{path.name}: cannot be read: {e}"
        raise DataError(msg, path=str(path)) from e
    except DataError:
        raise
    except (ValueError, RecursionError) as e:
        msg = f"{path.name}: expected JSON, got {e}"
        raise DataError(msg, path=str(path)) from e
    if not isinstance(value, dict):
        msg = f"{path.name}: expected a JSON object, got {type(value).__name__}"
        raise DataError(msg, path=str(path))
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    The format holds no code. The header is checked against the file's size before memory is allocated.

    Raises:
        DataError: If the file is missing, unreadable or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        file_size(path)
        return load_file(path)
    except FileNotFoundError as e:
        msg = f"{path.name} is missing"
        raise DataError(msg, path=str(path)) from e
    except DataError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as e:
        msg = f"{path.name}: expected a safetensors file, this one is damaged or something else: {e}"
        raise DataError(msg, path=str(path)) from e


def file_size(path: Path, name: str | None = None) -> int:
    """Size in bytes of a regular file; other kinds are refused, since opening a pipe would wait forever.

    Args:
        path: Path of the file.
        name: Name of the file in the error, None for the last part of the path.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        msg = f"{path.name if name is None else name}: expected a regular file, got {_kind(found.st_mode)}"
        raise DataError(msg, path=str(path))
    return found.st_size


def _kind(mode: int) -> str:
    return "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "something else"
