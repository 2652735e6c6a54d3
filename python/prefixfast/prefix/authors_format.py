"""Checkpoints of the code of Li & Liang (2021) for BART: a folder with ``pytorch_model.bin`` and ``config.json``.

The checkpoint holds one embedding and one MLP for each site. Their output ``[P, 2 * L * H * D]``, viewed as
``[P, 2 L, H, D]``, holds key and value of each layer in turn: k0, v0, k1, v1. The decoder's text starts at position 0.

Shape letters: P prefix rows, L layers of the decoder, H heads of the decoder, D head dimension, E embedding dimension.

Source:
    https://github.com/XiangLi1999/PrefixTuning, class ``PrefixTuning`` of ``seq2seq/prefixTuning.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.config.sites import Site
from prefixfast.errors import DataError, shown
from prefixfast.io.pickle_worker import read_pickle
from prefixfast.io.untrusted import read_json
from prefixfast.prefix.names import PrefixFields

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
# Embedding and MLP of each site by their names in the checkpoint.
MODULES: dict[Site, tuple[str, str]] = {
    "enc": ("wte_enc", "control_trans_enc"),
    "self": ("wte", "control_trans"),
    "cross": ("wte2", "control_trans2"),
}
SIZES = ("preseqlen", "decoder_layers", "decoder_attention_heads", "d_model")
LINEAR = re.compile(r"([0-9]{1,2})\.(weight|bias)")


def is_authors(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of the authors' code."""
    if not (os.path.lexists(folder / WEIGHTS) and os.path.lexists(folder / CONFIG)):
        return False
    try:
        return "preseqlen" in read_json(folder / CONFIG)
    except DataError:
        return False


def base_of(folder: Path) -> str | None:
    """Name of the base model in a checkpoint's configuration, None if there is none.

    Raises:
        DataError: If the configuration is damaged.
    """
    name = read_json(folder / CONFIG).get("_name_or_path")
    return name if isinstance(name, str) and name else None


def read_authors(folder: Path) -> tuple[dict[str, Tensor], PrefixFields]:
    """Tensors and fields of the prefix that a checkpoint of the authors' code computes.

    Args:
        folder: Folder for which `is_authors` holds.

    Raises:
        DataError: If the checkpoint is one of GPT-2, or a file is damaged or holds something else.
    """
    config, path = read_json(folder / CONFIG), folder / CONFIG
    if config.get("is_encoder_decoder") is False or config.get("model_type", "bart") != "bart":
        expected, got = "a checkpoint of BART (model_type bart)", shown(config.get("model_type"))
        msg = f"{CONFIG}: expected {expected}, got {got}; those of GPT-2 are not read, train the prefix again"
        raise DataError(msg, path=str(path))
    sizes = [config.get(name) for name in SIZES]
    if not all(type(n) is int and n >= 1 for n in sizes):
        msg = f"{CONFIG}: {', '.join(SIZES)}: expected numbers of at least 1, got {sizes}"
        raise DataError(msg, path=str(path))
    if config["d_model"] % config["decoder_attention_heads"]:
        expected = f"a multiple of decoder_attention_heads ({config['decoder_attention_heads']})"
        msg = f"{CONFIG}: d_model: expected {expected}, got {config['d_model']}"
        raise DataError(msg, path=str(path))
    found = read_pickle(folder / WEIGHTS)
    try:
        kv, trained = _tensors(found, config)
    except DataError as e:
        msg = f"{WEIGHTS}: {e}"
        raise DataError(msg, path=str(folder / WEIGHTS)) from e
    name = base_of(folder)
    training: dict[str, JSON] = {"imported_from": "li-liang", "num_trained": trained}
    return kv, {"pos_start": 0, "base": {"name": name} if name else None, "training": training}


def _tensors(found: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Keys and values of all sites by name, and the number of parameters that computed them."""
    layers, heads = config["decoder_layers"], config["decoder_attention_heads"]
    if flat := next((name for name in found if name in {mlp for _, mlp in MODULES.values()}), None):
        msg = f"{flat}: expected the weights of an MLP, got a flat tensor, whose layout is not known for BART"
        raise DataError(msg)
    known = [f"{module}." for pair in MODULES.values() for module in pair]
    if other := sorted(name for name in found if not name.startswith(tuple(known))):
        msg = f"expected only the tensors of {', '.join(known)}, got {shown(other[0])}"
        raise DataError(msg)
    if integer := next((name for name, t in found.items() if not t.is_floating_point()), None):
        msg = f"{integer}: expected floating-point numbers, got {found[integer].dtype}"
        raise DataError(msg)
    kv: dict[str, Tensor] = {}
    for site, (embedding, mlp) in MODULES.items():
        own = {name: t.float() for name, t in found.items() if name.startswith((f"{embedding}.", f"{mlp}."))}
        if not own:
            continue
        if site == "enc" and config.get("encoder_layers", layers) != layers:
            got = f"{shown(config['encoder_layers'])} encoder and {layers} decoder layers"
            msg = f"{mlp}: expected as many encoder layers as decoder layers, for which it is made, got {got}"
            raise DataError(msg)
        rows = _rows(own, embedding, mlp, config["preseqlen"], 2 * config["d_model"] * layers)
        parts = rows.unflatten(1, (2 * layers, heads, -1))
        kv |= {f"{site}.{i}.{x}": parts[:, 2 * i + j].contiguous() for i in range(layers) for j, x in enumerate("kv")}
    if not kv:
        msg = f"expected the tensors of {', '.join(known)}, got none"
        raise DataError(msg)
    return kv, sum(t.numel() for t in found.values())


def _rows(own: Mapping[str, Tensor], embedding: str, mlp: str, length: int, width: int) -> Tensor:
    """Output ``[P, width]`` of an MLP of linear layers with tanh between them, for the rows of an embedding."""
    first = own.get(f"{embedding}.weight")
    matched = {name: LINEAR.fullmatch(name.removeprefix(f"{mlp}.")) for name in own if name.startswith(f"{mlp}.")}
    numbers = sorted({int(m[1]) for m in matched.values() if m is not None})
    if first is None or None in matched.values() or not numbers or numbers != list(range(0, 2 * len(numbers), 2)):
        expected = f"{embedding}.weight and the weights and biases of {mlp}.0, {mlp}.2 and so on"
        msg = f"expected {expected}, got {sorted(own)}"
        raise DataError(msg)
    if first.ndim != 2 or len(first) != length:
        msg = f"{embedding}.weight: expected {length} rows (preseqlen), got {list(first.shape)}"
        raise DataError(msg)
    out = first
    for number in numbers:
        weight, bias = own.get(f"{mlp}.{number}.weight"), own.get(f"{mlp}.{number}.bias")
        if weight is None or weight.ndim != 2 or weight.shape[1] != out.shape[1]:
            got = None if weight is None else list(weight.shape)
            msg = f"{mlp}.{number}.weight: expected [n, {out.shape[1]}], got {got}"
            raise DataError(msg)
        if bias is None or bias.shape != weight.shape[:1]:
            got = None if bias is None else list(bias.shape)
            msg = f"{mlp}.{number}.bias: expected [{len(weight)}], got {got}"
            raise DataError(msg)
        out = out.tanh() if number else out
        out = out @ weight.T + bias
    if out.shape[1] != width:
        msg = f"{mlp}: expected rows of {width} numbers (2 * decoder_layers * d_model), got {out.shape[1]}"
        raise DataError(msg)
    return out
