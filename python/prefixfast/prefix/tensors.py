"""`PrefixTensors`: the tensors of a prefix, which no caller can change. torch is imported only to copy one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prefixfast.errors import DataError, shown

if TYPE_CHECKING:
    from torch import Tensor


class PrefixTensors(Mapping[str, "Tensor"]):
    """Tensors by name, copied from the caller's; every access returns a copy.

    The digest of a prefix stays true only if nobody else holds its memory. torch has no read-only tensors, and a
    change through ``numpy()`` or ``data`` leaves no trace.

    Args:
        given: Tensors by name. Those of another `PrefixTensors` are shared instead of copied.

    Raises:
        DataError: If a value is no dense tensor, with its name.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self._tensors: Mapping[str, Tensor]
        if isinstance(given, PrefixTensors):
            self._tensors = given._tensors
        else:
            self._tensors = {name: _copy(name, t) for name, t in _items(given)}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        """Shape of each tensor."""
        return f"{type(self).__name__}({ {n: list(t.shape) for n, t in self._tensors.items()} })"

    def shared(self) -> Mapping[str, Tensor]:
        """The tensors without a copy."""
        return self._tensors


def _items(given: object) -> Iterable[tuple[Any, Any]]:
    if not isinstance(given, Mapping):
        msg = f"kv: expected a mapping of names to tensors, got {shown(given)}"
        raise DataError(msg)
    return given.items()


def shared_tensors(kv: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of a prefix without a copy, for code that only reads them and gives them to nobody."""
    return kv.shared() if isinstance(kv, PrefixTensors) else kv


def _copy(name: Any, given: Any) -> Tensor:
    """Copy of a tensor in memory of its own, without a gradient."""
    import torch

    if not isinstance(name, str):
        msg = f"tensor name: expected a string such as 'self.0.k', got {shown(name)}"
        raise DataError(msg)
    if not isinstance(given, torch.Tensor) or given.layout != torch.strided or given.is_meta:
        got = f"a tensor {given.layout} on {given.device}" if isinstance(given, torch.Tensor) else type(given).__name__
        msg = f"{name:.200}: expected a dense torch.Tensor, got {got}; torch.from_numpy makes one of a NumPy array"
        raise DataError(msg)
    return given.detach().clone(memory_format=torch.contiguous_format)
