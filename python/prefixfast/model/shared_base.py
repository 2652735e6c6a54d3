"""One base model that the process keeps for calls that name it, shared by train, generate and score."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prefixfast.errors import ConfigError
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.load import load


@dataclass
class _Cached:
    key: tuple[Any, ...]
    model: Model


_CACHE: list[_Cached] = []
_CACHE_LOCK = threading.Lock()


def check_base_fields(
    model: Model, *, dtype: str = "auto", device: str = "auto", revision: str | None = None, backend: str = "auto"
) -> None:
    """Raise `ConfigError` if a base that is loaded already is not as an engine's options want it."""
    name = next((n for n, d in DTYPES.items() if d == model.dtype), str(model.dtype))
    have = {"dtype": (dtype, name), "device": (device, model.device.type), "backend": (backend, model.backend.name)}
    for option, (wanted, got) in have.items():
        if wanted not in ("auto", got) and not (option == "device" and torch.device(wanted) == model.device):
            msg = f"{option}: this base was loaded with {got!r}, got {wanted!r}; load it again with {option}={wanted!r}"
            raise ConfigError(msg)


@contextlib.contextmanager
def borrowed(model: str | Path | PreTrainedModel | Model, **how: Any) -> Iterator[Model]:
    """A base for the time of one call: a name is loaded once per process and kept, an object is attached and given back, a `Model` is used as it is.

    Args:
        model: The base.
        how: ``dtype``, ``device``, ``revision`` and ``backend`` of `load`; the kept base is another one where they differ.
    """
    if isinstance(model, Model):
        yield model.opened()
    elif isinstance(model, str | Path):
        with _CACHE_LOCK:
            key = (str(model), *sorted((name, value) for name, value in how.items() if value not in ("auto", None)))
            if not _CACHE or _CACHE[0].key != key:
                _drop()
                _CACHE.append(_Cached(key, load(model, **how)))
            kept = _CACHE[0].model
        yield kept
    else:
        loaded = load(model)
        try:
            yield loaded
        finally:
            loaded.close()


def unload() -> None:
    """Free the base that this process keeps for calls by name; the next such call loads it again.

    Example:
        >>> unload()
    """
    with _CACHE_LOCK:
        _drop()


def _drop() -> None:
    while _CACHE:
        _CACHE.pop().model.close()
