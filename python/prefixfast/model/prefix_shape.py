"""`PrefixShape`, the attributes of a prefix that tell whether the prefix fits a base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from prefixfast.model.fingerprint import Fingerprint


class PrefixShape(Protocol):
    """A prefix, or the entry of a prefix in a store."""

    @property
    def base(self) -> Fingerprint | None:
        """Fingerprint of the base model, None if unknown."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Shape ``(P, H, D)`` of each tensor."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have rows, ascending."""
