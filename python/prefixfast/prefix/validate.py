"""Checks of the tensors and conventions of a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefixfast.config.sites import SITES
from prefixfast.errors import DataError, shown

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
MAX_POSITION = 2**31 - 1
MAX_LAYER_DIGITS = 6


def check_prefix(kv: Mapping[str, Tensor], pos_start: Any, window: Any, position: Any) -> None:
    """Check the tensors and conventions of a prefix.

    Args:
        kv: Tensors by name.
        pos_start: Position of the first token after the prefix.
        window: Treatment of the prefix by sliding windows.
        position: Place of the prefix in a sequence.

    Raises:
        DataError: If a name, shape, dtype, number or convention is not one that a prefix can have.
    """
    if not kv:
        msg = "a prefix needs at least one layer's keys and values"
        raise DataError(msg)
    for name, t in kv.items():
        parts = name.split(".")
        if len(parts) != 3 or parts[0] not in SITES or not _is_layer_number(parts[1]) or parts[2] not in ("k", "v"):
            msg = f"tensor name: expected {{{'|'.join(SITES)}}}.{{layer}}.{{k|v}}, got {shown(name)}"
            raise DataError(msg)
        other = kv.get(f"{parts[0]}.{parts[1]}.{'v' if parts[2] == 'k' else 'k'}")
        if t.ndim != 3 or str(t.dtype) not in DTYPES or other is None or other.shape[:2] != t.shape[:2] or 0 in t.shape:
            partner = None if other is None else list(other.shape)
            msg = (
                f"{name}: expected a float [P, H, D] with a partner of the same P and H, got {t.dtype} {list(t.shape)} "
                f"and {partner}"
            )
            raise DataError(msg)
        if not bool(t.isfinite().all()):
            msg = f"{name}: expected finite numbers, got NaN or infinity"
            raise DataError(msg)
    if error := convention_error(pos_start, window, position):
        raise DataError(error)


def convention_error(pos_start: Any, window: Any, position: Any) -> str | None:
    """Error message for wrong values of ``pos_start``, ``window`` and ``position``, None if all are right."""
    if not isinstance(position, str) or position not in ("prefix", "infix"):
        return f"expected position 'prefix' or 'infix', got {shown(position)}"
    if (
        type(pos_start) is int
        and 0 <= pos_start <= MAX_POSITION
        and isinstance(window, str)
        and window in ("slide", "always")
    ):
        return None
    return (
        f"expected pos_start >= 0 and window 'slide' or 'always', got {shown(pos_start)} and {shown(window)}; "
        f"positions end at {MAX_POSITION}"
    )


def _is_layer_number(text: str) -> bool:
    """Whether a text is a layer number without sign, leading zero or digits of other scripts."""
    return text.isdecimal() and len(text) <= MAX_LAYER_DIGITS and str(int(text)) == text
