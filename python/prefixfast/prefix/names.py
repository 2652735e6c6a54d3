"""Names and types of the fields of a prefix, and names of its tensors. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, Required, TypeAlias, TypedDict

from prefixfast.config.json_types import JSON

if TYPE_CHECKING:
    from prefixfast.model.fingerprint import Fingerprint

Window: TypeAlias = Literal["slide", "always"]
FIELD_NAMES = ("pos_start", "window", "base", "task", "decoding", "training")


class PrefixFields(TypedDict, total=False):
    """Attributes of a `Prefix` other than its tensors, as arguments of the constructor."""

    pos_start: Required[int]
    window: Window
    base: Fingerprint | None
    task: Mapping[str, JSON] | None
    decoding: Mapping[str, JSON]
    training: Mapping[str, JSON]


def file_key(field: str) -> str:
    """Key of a field in ``prefixfast.json`` and ``entry.json``; version 0.1.0 wrote the task as ``linearizer``."""
    return "linearizer" if field == "task" else field


def layers_of(names: Iterable[str]) -> tuple[int, ...]:
    """Layers of site ``self`` among the names of tensors, ascending."""
    return tuple(sorted({int(name.split(".")[1]) for name in names if name.startswith("self.")}))
