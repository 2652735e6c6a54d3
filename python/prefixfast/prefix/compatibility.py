"""`check_fits`: whether a prefix fits a base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from prefixfast.errors import BaseMismatchError
from prefixfast.model.base import Model
from prefixfast.model.fingerprint import check_base, num_layers


class PrefixShape(Protocol):
    """What `check_fits` reads of a prefix, or of its entry in a store."""

    @property
    def base(self) -> Mapping[str, Any] | None:
        """Fingerprint of the base model, None if unknown."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Shape ``(P, H, D)`` of each tensor."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have rows, ascending."""


def check_fits(model: Model, prefix: PrefixShape, what: str = "the prefix") -> None:
    """Check that a prefix was made for a base and has its shapes: blocks of one length, in layers that the base has.

    Args:
        model: Base model.
        prefix: Prefix, or its entry in a store.
        what: Name of the prefix in the error's message.

    Raises:
        BaseMismatchError: If the prefix was made for another base, or its shapes are not those of the base.

    Example:
        >>> check_fits(base, prefix)
    """
    check_base(dict(prefix.base) if prefix.base else None, model.fingerprint, what)
    expected = {f"self.{i}.{x}": (s.num_kv_heads, s.head_dim) for i, s in enumerate(model.layers) for x in "kv"}
    got = {name: shape[1:] for name, shape in prefix.shapes.items()}
    wrong = min((name for name, shape in got.items() if expected.get(name) != shape), default=None)
    # A PEFT adapter of a smaller model has the first layers, and does not say how many layers its base has.
    unknown = (
        num_layers(prefix.base) is None
        and prefix.layers == tuple(range(len(prefix.layers)))
        and len(got) < len(expected)
    )
    reasons = {
        f"{wrong}: {got.get(wrong or '')} where {expected.get(wrong or '')} is expected": wrong is not None,
        "the first ones, and it does not say for how many it was made": unknown,
        "of different lengths": len({shape[0] for shape in prefix.shapes.values()}) != 1,
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        msg = (
            f"{what}: expected one length and layers of [P, H, D] as this base has {len(model.layers)} of "
            f"(self.0.k: {expected['self.0.k']}), got {len(got) // 2} layers, {reason}; was it trained on another model?"
        )
        raise BaseMismatchError(msg)
