"""Which backend serves a call: by what was asked for, the device, and what each backend does not serve."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

from prefixfast.errors import ConfigError
from prefixfast_kernels import tile_configs as tiles
from prefixfast_kernels.tile_configs import Backend

BACKENDS = ("triton", "torch", "reference")
WHAT = {
    "triton": "one fused kernel",
    "attend": "Rust, each row's keys read once where they lie",
    "torch": "grouped by prefix and merged",
    "reference": "the specification, slow",
}
Reasons = dict[str, dict[str, bool]]  # of each backend what it does not serve, and whether the call has it
logger = logging.getLogger(__name__)


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], num_kv_heads: int = 1
) -> Backend:
    """The backend of a model.

    Args:
        name: ``"auto"`` or one of `BACKENDS`.
        device: Where the model runs.
        dtype: Its compute dtype.
        shapes: (queries per kv head, head dim) of every layer.
        num_kv_heads: Of a layer; the most where layers differ.

    Raises:
        ConfigError: For an unknown name, or ``"triton"`` where its kernels cannot run.
    """
    if name not in ("auto", *BACKENDS):
        msg = f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {name!r}"
        raise ConfigError(msg)
    if name in ("torch", "reference") or (name == "auto" and device.type == "cpu"):
        return Backend("torch" if name == "auto" else name)
    try:
        if not _has_triton():
            msg = "triton is not installed; use backend='torch'"
            raise ValueError(msg)
        return Backend(
            name, tiles.sizes(device, dtype, shapes), tiles.decode_sizes(device, dtype, shapes, num_kv_heads)
        )
    except (ValueError, KeyError) as e:
        if name == "triton":
            msg = f"backend 'triton': {e}"
            raise ConfigError(msg) from e
        logger.warning("the triton kernels do not run here, using torch: %s", e)
        return Backend("torch")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=64)
def log_fallback(op: str, backend: str, reason: str) -> None:
    """Say once that a call goes to a slower backend."""
    logger.warning("%s: the %s backend does not serve %s; falling back to a slower one", op, backend, reason)


def pick(op: str, name: str, device: torch.device, reasons: Reasons) -> str:
    """The first backend that serves a call; those before it are logged once with what they do not serve.

    Raises:
        ConfigError: If none does that ``name`` allows.
    """
    chosen, refused = first(name, device, reasons)
    for backend, reason in refused.items():
        if chosen is None:
            msg = f"backend {name!r}: {op} does not serve {reason}; use backend='auto' to let another one do it"
            raise ConfigError(msg)
        log_fallback(op, backend, reason)
    assert chosen is not None
    return chosen


def first(name: str, device: torch.device, reasons: Reasons) -> tuple[str | None, dict[str, str]]:
    """The first backend that serves a call, None if none does, and of those before it what they do not serve."""
    order = {"auto": BACKENDS if device.type == "cuda" else BACKENDS[1:], "torch": BACKENDS[1:]}.get(name, (name,))
    if "attend" in reasons and "torch" in order:
        order = ("attend", *order)
    refused: dict[str, str] = {}
    for backend in order:
        reason = next((reason for reason, holds in reasons.get(backend, {}).items() if holds), None)
        if reason is None:
            return backend, refused
        refused[backend] = reason
    return None, refused


def say(name: str, device: torch.device, reasons: Reasons) -> str:
    """Which backend serves a call, and why no faster one."""
    chosen, refused = first(name, device, reasons)
    why = [f"{backend} does not serve {reason}" for backend, reason in refused.items()]
    if name != "auto" and device.type == "cuda":
        why.append(f"backend={name!r} was asked for")
    return f"{chosen} ({WHAT[chosen or name]})" + (f"; {', '.join(why)}" if why else "")
