"""JSON that every reader takes: UTF-8 without lone surrogates, and no NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_bytes(value: Any, **how: Any) -> bytes:
    """JSON of a value as UTF-8.

    A number that is not finite becomes null, since JSON has none. Text with lone surrogates, which UTF-8 cannot hold,
    is written with escapes.

    Args:
        value: Value of types that JSON has.
        how: Further arguments of `json.dumps`.

    Raises:
        TypeError: If JSON has no such type.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **how)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(_finite(value), allow_nan=False, **how).encode()


def json_line(value: Any) -> bytes:
    """One line of a ``.jsonl`` file, with its line break."""
    return json_bytes(value) + b"\n"


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
