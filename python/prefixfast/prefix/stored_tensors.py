"""`StoredTensors`, the sizes and the description that a prefix and trained weights have in common.

torch is imported only with the tensors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError, shown

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.model.fingerprint import Fingerprint

OPTIONAL = ("base", "task")  # mappings that can be None


class StoredTensors:
    """Sizes and description of tensors that a folder holds."""

    if TYPE_CHECKING:
        base: Fingerprint | None
        task: Mapping[str, JSON] | None
        training: Mapping[str, JSON]

        @property
        def digest(self) -> str:
            """SHA-256 of what is stored, in hex digits."""

    @property
    def _stored(self) -> Mapping[str, Tensor]:
        """The tensors without a copy."""
        raise NotImplementedError

    @property
    def num_stored(self) -> int:
        """Number of stored numbers, of the paper's prefixes about 0.1 % of the base model's."""
        return sum(t.numel() for t in self._stored.values())

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusted; with an MLP of a prefix many more than `num_stored`."""
        trained: Any = self.training.get("num_trained", self.num_stored)
        return int(trained)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self._stored.values())

    def _described(self, **about: object) -> str:
        """One line with some values, base model, task and digest."""
        own = {"base": self.base.get("name") if self.base else None, "task": (self.task or {}).get("name")}
        known = ", ".join(f"{name}={value!r}" for name, value in (about | own).items() if value is not None)
        return f"{type(self).__name__}({known}, digest={self.digest[:12]!r})"

    def _copy_mappings(self, names: Iterable[str]) -> None:
        """Replace mappings by copies that nobody else changes, and that files can hold.

        Args:
            names: Names of the attributes.

        Raises:
            DataError: If one is no mapping, or has values that JSON cannot hold.
        """
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Mapping) and not (value is None and name in OPTIONAL):
                msg = f"{name}: expected a mapping, got {shown(value)}"
                raise DataError(msg)
            object.__setattr__(self, name, None if value is None else json_copy(name, value))


def json_copy(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of a mapping that the files of a prefix can hold, and from which a reader gets an equal one."""
    try:
        json.dumps(dict(value), allow_nan=name == "training")  # losses of a run can be NaN; NaN equals nothing
    except (TypeError, ValueError, RecursionError) as e:
        msg = f"{name}: expected finite numbers and other values that JSON can hold, got {shown(value)}: {e}"
        raise DataError(msg) from e
    return copy.deepcopy(dict(value))
