"""Cache of one base model per process, which calls of train, generate and score by name share."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from prefixfast.config.engine import BaseMismatch
from prefixfast.errors import ConfigError
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.load import find_device, load

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class _Cached:
    key: tuple[Any, ...]
    model: Model


_CACHE: list[_Cached] = []
_CACHE_LOCK = threading.Lock()


def check_base_fields(
    model: Model,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    backend: str = "auto",
    allow_base_mismatch: BaseMismatch | None = None,
) -> None:
    """Raise `ConfigError` if a loaded base model differs from the options of an engine.

    Args:
        model: Loaded base model.
        dtype: Compute dtype, ``"auto"`` for any.
        device: Device, ``"auto"`` for any.
        revision: Revision of a hub id, not compared since a loaded model does not say its own.
        backend: Backend, ``"auto"`` for any.
        allow_base_mismatch: Accepted difference from the base models of prefixes, None for that of the model.
    """
    if device != "auto":
        find_device(device)  # raises for a name that torch does not know
    name = next((n for n, d in DTYPES.items() if d == model.dtype), str(model.dtype))
    have = {
        "dtype": (dtype, name),
        "device": (device, model.device.type),
        "backend": (backend, model.backend.name),
        "allow_base_mismatch": (allow_base_mismatch or "auto", model.allow_base_mismatch),
    }
    for option, (wanted, got) in have.items():
        if wanted not in ("auto", got) and not (option == "device" and torch.device(wanted) == model.device):
            msg = f"{option}: this base was loaded with {got!r}, got {wanted!r}; load it again with {option}={wanted!r}"
            raise ConfigError(msg)


@contextlib.contextmanager
def borrowed(model: str | Path | PreTrainedModel | PeftModel | Model, **how: Any) -> Iterator[Model]:
    """Context manager of a base model for one call.

    A base model that is given by name is loaded and stays in the process's cache. A Hugging Face model is attached, and
    restored at the end. A `Model` is used as it is.

    Args:
        model: Base model, as `load` takes it.
        how: Arguments ``dtype``, ``device``, ``revision``, ``backend`` and ``allow_base_mismatch`` of `load` for a base
            model by name; the cache holds the base model of one name and one set of these arguments.

    Yields:
        Attached base model.
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
    """Free the base model in the process's cache; the next call by name loads it again.

    Example:
        >>> unload()
    """
    with _CACHE_LOCK:
        _drop()


def _after_fork() -> None:
    global _CACHE_LOCK
    _CACHE_LOCK = threading.Lock()  # another thread of the parent can hold the old one


os.register_at_fork(after_in_child=_after_fork)


def _drop() -> None:
    while _CACHE:
        _CACHE.pop().model.close()
