"""Names and types of the fields of a prefix, and names of its tensors. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Required, TypeAlias, TypedDict, TypeVar

from prefixfast.config.json_types import JSON
from prefixfast.config.sites import Site
from prefixfast.errors import shown

if TYPE_CHECKING:
    from prefixfast.model.fingerprint import Fingerprint

T = TypeVar("T")
Window: TypeAlias = Literal["slide", "always"]
Position: TypeAlias = Literal["prefix", "infix"]
FIELD_NAMES = ("pos_start", "window", "base", "task", "decoding", "training", "position")
UNWRITTEN = {"position": "prefix"}  # values that files leave out, as those of version 0.1.0 do

WEIGHTS_USE = (
    "they change the base for all requests: generate and score take them alone, with --prefix FOLDER of the command or "
    "TunedWeights.from_pretrained in Python"
)
TYPES_OF_BASE_KEYS = {"name": str, "config": dict, "tokenizer": str, "weights": str, "sample": dict}


class PrefixFields(TypedDict, total=False):
    """Attributes of a `Prefix` other than its tensors, as arguments of the constructor."""

    pos_start: Required[int]
    window: Window
    base: Fingerprint | None
    task: Mapping[str, JSON] | None
    decoding: Mapping[str, JSON]
    training: Mapping[str, JSON]
    position: Position


def written(values: Mapping[str, T]) -> dict[str, T]:
    """Values by field without those that files leave out."""
    return {name: value for name, value in values.items() if (name, value) not in UNWRITTEN.items()}


def file_key(field: str) -> str:
    """Key of a field in ``prefixfast.json`` and ``entry.json``; version 0.1.0 wrote the task as ``linearizer``."""
    return "linearizer" if field == "task" else field


def base_error(base: object) -> str | None:
    """Error message for a fingerprint of a base model from a file, None if its keys have the right types."""
    if base is None:
        return None
    if not isinstance(base, dict):
        return f"base: expected an object or null, got {shown(base)}"
    for key, kind in TYPES_OF_BASE_KEYS.items():
        if not isinstance(base.get(key), kind | None):
            return f"base.{key}: expected {kind.__name__} or null, got {shown(base[key])}"
    for kind, named in (base.get("sample") or {}).items():
        if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
            return f"base.sample.{kind}: expected texts by name, got {shown(named)}"
    return None


def no_prefix(method: object) -> str:
    """Error message for trained weights in the place of a prefix.

    Args:
        method: Method that trained them.
    """
    return f"expected a prefix, this folder holds weights of method {shown(method)}; {WEIGHTS_USE}"


def site_of(name: str) -> Site:
    """Site of a tensor's name, which has been checked."""
    site: Any = name.partition(".")[0]
    return site


def layers_of(names: Iterable[str], site: Site = "self") -> tuple[int, ...]:
    """Layers of a site among the names of tensors, ascending."""
    return tuple(sorted({int(name.split(".")[1]) for name in names if name.startswith(f"{site}.")}))
