"""Choice of the backend that runs an attention call, by name, by device and by what each backend supports."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Mapping

import torch

from prefixfast.errors import ConfigError, shown, suggestion
from prefixfast_kernels.tile_selection import Backend, decode_sizes, tile_sizes

BACKENDS = ("triton", "torch", "reference")
DESCRIPTIONS = {
    "triton": "one fused kernel",
    "rust": "each row's keys read once, in place",
    "torch": "grouped by prefix and merged",
    "reference": "the specification, slow",
}
Unsupported = dict[
    str, list[str]
]  # reasons why a call is unsupported, by backend; empty for a backend that supports it
logger = logging.getLogger(__name__)


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], num_kv_heads: int = 1
) -> Backend:
    """Backend of a model.

    Args:
        name: ``"auto"`` or one of `BACKENDS`.
        device: Device of the model.
        dtype: Compute dtype of the model.
        shapes: (queries per kv head, head dim) of every layer.
        num_kv_heads: Number of kv heads of a layer, the largest one where layers differ.

    Raises:
        ConfigError: If the name is unknown, or if it is ``"triton"`` and the Triton kernels cannot run.
    """
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        known = ", ".join(BACKENDS)
        msg = f"backend: expected 'auto' or one of {known}, got {shown(name)}; {suggestion(name, BACKENDS)}"
        raise ConfigError(msg)
    if name in ("torch", "reference") or (name == "auto" and device.type == "cpu"):
        return Backend("torch" if name == "auto" else name)
    try:
        if not _has_triton():
            msg = "triton is not installed; use backend='torch'"
            raise ValueError(msg)
        return Backend(name, tile_sizes(device, dtype, shapes), decode_sizes(device, dtype, shapes, num_kv_heads))
    except (ValueError, KeyError) as e:
        if name == "triton":
            msg = f"backend 'triton': {e}"
            raise ConfigError(msg) from e
        logger.warning("the Triton kernels cannot run here, using the torch backend: %s", e)
        return Backend("torch")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=64)
def log_fallback(op: str, backend: str, reason: str) -> None:
    """Log once that calls of an operator run on a slower backend."""
    logger.warning("%s: the %s backend does not support %s; using a slower backend", op, backend, reason)


def select_backend(op: str, name: str, device: torch.device, unsupported: Unsupported) -> str:
    """First backend that supports a call. The faster backends that do not are logged once with their reasons.

    Args:
        op: Name of the operator, for messages.
        name: Backend that was asked for: ``"auto"``, or one of `BACKENDS`.
        device: Device of the call.
        unsupported: Reasons why the call is unsupported, by backend.

    Raises:
        ConfigError: If no backend that ``name`` allows supports the call.
    """
    chosen, refused = first_supported(name, device, unsupported)
    for backend, reason in refused.items():
        if chosen is None:
            msg = f"backend {name!r}: {op} does not support {reason}; use backend='auto' to allow other backends"
            raise ConfigError(msg)
        log_fallback(op, backend, reason)
    assert chosen is not None
    return chosen


def first_supported(name: str, device: torch.device, unsupported: Unsupported) -> tuple[str | None, dict[str, str]]:
    """First backend that supports a call, or None, and the first reason of each backend before it.

    Args:
        name: Backend that was asked for: ``"auto"``, or one of `BACKENDS`. ``"torch"`` allows the Rust implementation
            and the reference too.
        device: Device of the call.
        unsupported: Reasons why the call is unsupported, by backend.
    """
    order = {"auto": BACKENDS if device.type == "cuda" else BACKENDS[1:], "torch": BACKENDS[1:]}.get(name, (name,))
    if "rust" in unsupported and "torch" in order:
        order = ("rust", *order)
    refused: dict[str, str] = {}
    for backend in order:
        reasons = unsupported.get(backend)
        if not reasons:
            return backend, refused
        refused[backend] = reasons[0]
    return None, refused


def describe_choice(name: str, device: torch.device, unsupported: Unsupported, descriptions: Mapping[str, str]) -> str:
    """Backend that runs a call, and why no faster backend does."""
    chosen, refused = first_supported(name, device, unsupported)
    why = [f"{backend} does not support {reason}" for backend, reason in refused.items()]
    if name != "auto" and device.type == "cuda":
        why.append(f"backend={name!r} was requested")
    return f"{chosen} ({descriptions[chosen or name]})" + (f"; {', '.join(why)}" if why else "")
