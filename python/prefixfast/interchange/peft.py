"""PEFT's PREFIX_TUNING adapter for decoder-only models: one table ``prompt_embeddings [P, L * 2 * H * D]``, keys and values interleaved by layer.

``table[p].view(L, 2, H, D)`` holds (key, value) of every layer; text starts at position P and keys are stored after RoPE.
Source: PEFT 0.21.2, ``peft_model.py`` get_prompt and get_prompt_embedding_to_save; verified bit-exact in tests/unit/test_prefix.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from prefixfast.errors import DataError

CONFIG, WEIGHTS, KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
SIZES = ("num_layers", "num_attention_heads", "num_virtual_tokens")
FIELDS = {
    "auto_mapping": None,
    "encoder_hidden_size": None,
    "inference_mode": True,
    "init_weights": None,
    "modules_to_save": None,
    "num_transformer_submodules": 1,
    "peft_type": "PREFIX_TUNING",
    "peft_version": "0.21.2",
    "prefix_projection": False,
    "revision": None,
    "task_type": "CAUSAL_LM",
}


def reason_against(kv: Mapping[str, Tensor], pos_start: int, window: str) -> str | None:
    """Why PEFT cannot hold a prefix exactly, or None if it can.

    Args:
        kv: ``self.{layer}.k|v`` of ``[P, H, D]``.
        pos_start: Position of the first token.
        window: ``"slide"`` or ``"always"``.
    """
    shapes = {tuple(t.shape) for t in kv.values()}
    layers = len(kv) // 2
    reasons = {
        "it has sites other than 'self'": any(not name.startswith("self.") for name in kv),
        "its layers differ in shape": len(shapes) != 1,
        "its tensors differ in dtype": len({t.dtype for t in kv.values()}) != 1,
        "its numbers are fp64": any(t.dtype == torch.float64 for t in kv.values()),
        "some layers have no prefix": set(kv) != {f"self.{i}.{x}" for i in range(layers) for x in "kv"},
        "text starts at another position than the prefix's length": len(shapes) == 1 and pos_start != next(iter(shapes))[0],
        "sliding windows do not slide over it": window != "slide",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def to_table(kv: Mapping[str, Tensor]) -> Tensor:
    """``self.{layer}.k|v`` of ``[P, H, D]`` -> ``[P, L * 2 * H * D]``."""
    layers = len(kv) // 2
    stacked = torch.stack([kv[f"self.{i}.{x}"] for i in range(layers) for x in "kv"], 1)
    return stacked.flatten(1).contiguous()


def from_table(table: Tensor, num_layers: int, num_kv_heads: int) -> dict[str, Tensor]:
    """The inverse of `to_table`.

    Raises:
        DataError: If the table's width does not fit.
    """
    if table.ndim != 2 or table.shape[1] % (num_layers * 2 * num_kv_heads):
        msg = f"{KEY}: expected [P, {num_layers} layers * 2 * {num_kv_heads} heads * head_dim], got {list(table.shape)}"
        raise DataError(msg)
    parts = table.unflatten(1, (num_layers, 2, num_kv_heads, -1))
    return {f"self.{i}.{x}": parts[:, i, j].contiguous() for i in range(num_layers) for j, x in enumerate("kv")}


def files(kv: Mapping[str, Tensor], base_name: str | None) -> dict[str, bytes]:
    """The adapter folder's files by name."""
    table = to_table(kv)
    length, heads, dim = kv["self.0.k"].shape
    config = {
        **FIELDS,
        "base_model_name_or_path": base_name or None,
        "encoder_hidden_size": heads * dim,
        "num_attention_heads": heads,
        "num_layers": len(kv) // 2,
        "num_virtual_tokens": length,
        "token_dim": heads * dim,
    }
    return {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), WEIGHTS: save({KEY: table}, metadata={"format": "pt"})}


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of an adapter folder.

    Raises:
        DataError: If it is no decoder-only PREFIX_TUNING adapter, or its files are damaged.
    """
    config = read_json(folder / CONFIG)
    kind, submodules, task = (config.get(k) for k in ("peft_type", "num_transformer_submodules", "task_type"))
    if kind != "PREFIX_TUNING":
        msg = f"peft_type: expected PREFIX_TUNING, got {kind!r}"
        raise DataError(msg, path=str(folder / CONFIG))
    if submodules not in (1, None) or task not in ("CAUSAL_LM", None):
        msg = f"expected a decoder-only adapter (task_type CAUSAL_LM, num_transformer_submodules 1), got {task!r} and {submodules!r}"
        raise DataError(msg, path=str(folder / CONFIG))
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        msg = "adapter_model.bin is a pickle, which can run code when it is read; save the adapter again with PEFT's safe_serialization=True"
        raise DataError(msg, path=str(folder))
    tensors = read_tensors(folder / WEIGHTS)
    if set(tensors) != {KEY}:
        msg = f"expected the one tensor {KEY!r}, got {sorted(tensors)}"
        raise DataError(msg, path=str(folder / WEIGHTS))
    try:
        layers, heads, length = (int(config[k]) for k in SIZES)
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        msg = f"{', '.join(SIZES)}: expected numbers, got {[config.get(k) for k in SIZES]}"
        raise DataError(msg, path=str(folder / CONFIG)) from e
    if min(layers, heads, length) < 1:
        msg = f"{', '.join(SIZES)}: expected numbers of at least 1, got {[layers, heads, length]}"
        raise DataError(msg, path=str(folder / CONFIG))
    if len(tensors[KEY]) != length:
        msg = f"{WEIGHTS}: {KEY}: expected {length} rows (num_virtual_tokens), got {list(tensors[KEY].shape)}; see {CONFIG}"
        raise DataError(msg, path=str(folder / WEIGHTS))
    try:
        return from_table(tensors[KEY], layers, heads), config
    except DataError as e:
        msg = f"{WEIGHTS}: {e}"
        raise DataError(msg, path=str(folder / WEIGHTS)) from e


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or `DataError`."""
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as e:
        msg = f"{path.name} is missing; expected a prefix or PEFT adapter folder"
        raise DataError(msg, path=str(path)) from e
    except (ValueError, RecursionError) as e:
        msg = f"{path.name}: expected JSON, got {e}"
        raise DataError(msg, path=str(path)) from e
    if not isinstance(value, dict):
        msg = f"{path.name}: expected a JSON object, got {type(value).__name__}"
        raise DataError(msg, path=str(path))
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or `DataError`."""
    try:
        return load_file(path)
    except FileNotFoundError as e:
        msg = f"{path.name} is missing"
        raise DataError(msg, path=str(path)) from e
    except (SafetensorError, ValueError, RuntimeError) as e:
        msg = f"{path.name}: damaged or no safetensors file: {e}"
        raise DataError(msg, path=str(path)) from e
