"""JSON objects and safetensors from files that nobody vouches for: whatever is wrong with one is a `DataError` that names it."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prefixfast.errors import DataError

MOST_JSON = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 16 MiB.

    Raises:
        DataError: If the file is missing, unreadable, too large or no JSON object.
    """
    try:
        if (size := _size(path)) > MOST_JSON:
            msg = f"{path.name}: expected at most {MOST_JSON} bytes of JSON, got {size}"
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
    """All tensors of a safetensors file; no code in it can run, and its header is checked against its size before anything is allocated.

    Raises:
        DataError: If the file is missing, unreadable or damaged.
    """
    try:
        _size(path)
        return load_file(path)
    except FileNotFoundError as e:
        msg = f"{path.name} is missing"
        raise DataError(msg, path=str(path)) from e
    except DataError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as e:
        msg = f"{path.name}: damaged or no safetensors file: {e}"
        raise DataError(msg, path=str(path)) from e


def _size(path: Path) -> int:
    """Bytes of an ordinary file: opening a pipe would wait for ever."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        msg = f"{path.name}: expected an ordinary file"
        raise DataError(msg, path=str(path))
    return found.st_size
