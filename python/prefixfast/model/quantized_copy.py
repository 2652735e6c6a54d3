"""Quantized copies of a base model: how they are recognized, and the check that one is a copy of another base.

A fingerprint holds a few numbers of the weights. Quantization moves matrices by a part of their size, and keeps vectors
such as the scales of norms. Weights of another training agree in neither. A copy that was trained further can pass, if
its vectors did not move and its matrices moved no more than quantization does.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
KINDS = ("matrices", "vectors")
NUMBERS, MOST = 8, 48  # numbers of a parameter, and parameters of each kind
# Largest relative error of a copy. 4 bits give about 0.1 and 2 bits 0.3; vectors are rounded to bf16 once more.
LIMITS = {"matrices": 0.35, "vectors": 0.01}
EXACT_TYPES = ("F32", "F16", "BF16", "F64")
_WARNED: set[tuple[object, object]] = set()  # pairs of weights that a warning has named


def weight_sample(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, str]]:
    """A few numbers of each parameter in bf16, in base64, by kind and name.

    Args:
        parameters: Names and values, dequantized.
    """
    import torch

    found: dict[str, list[tuple[str, Tensor]]] = {kind: [] for kind in KINDS}
    for name, values in parameters:
        if values.is_floating_point() and values.numel():
            at = torch.arange(NUMBERS, device=values.device) * (values.numel() - 1) // (NUMBERS - 1)
            found[KINDS[values.dim() < 2]].append((name, values.reshape(-1)[at].to(torch.bfloat16)))
    kept = {kind: named[:: -(-len(named) // MOST) or 1] for kind, named in found.items()}
    numbers = [t for named in kept.values() for _, t in named]
    if not numbers:
        return {kind: {} for kind in KINDS}
    data = iter(torch.stack(numbers).cpu().view(torch.int16).numpy())  # one copy to the host
    return {
        kind: {name: base64.b64encode(next(data).astype("<i2").tobytes()).decode() for name, _ in named}
        for kind, named in kept.items()
    }


def quantization_of(model: PreTrainedModel) -> str | None:
    """Quantization of a model's weights, None if they are not known to be quantized.

    Args:
        model: Model.
    """
    import torch

    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
        return str(getattr(method, "value", method) or type(config).__name__)
    kinds = {type(p.data).__name__ for p in model.parameters() if type(p.data) is not torch.Tensor}
    return ", ".join(sorted(kinds)) or None


def gguf_quantization(path: Path) -> str | None:
    """Quantized types of the tensors in a ``.gguf`` file, None if none is quantized."""
    from gguf import GGUFReader

    kinds = {t.tensor_type.name for t in GGUFReader(path).tensors} - set(EXACT_TYPES)
    return f"gguf {', '.join(sorted(kinds))}" if kinds else None


def copy_error(ours: Mapping[str, Any], base: Mapping[str, Any], quantization: str | None) -> str | None:
    """Reason why a base model is no quantized copy of a prefix's base, None if it can be one.

    Args:
        ours: Fingerprint that the prefix holds.
        base: Fingerprint of the base model.
        quantization: Quantization of the base model, None if its weights are not quantized.
    """
    if quantization is None:
        return "this base is not known to be quantized"
    for kind, (error, _) in _errors(ours, base).items():
        if not error <= LIMITS[kind]:
            expected = f"those of a quantized copy by at most {LIMITS[kind]:.0%}"
            return f"the sampled {kind} differ by {error:.0%} of their size, {expected}"
    return None


def warn_copy(ours: Mapping[str, Any], base: Mapping[str, Any], quantization: str | None, what: str) -> None:
    """Log a warning that a prefix runs on a quantized copy of its base, once for each pair of weights.

    Args:
        ours: Fingerprint that the prefix holds.
        base: Fingerprint of the base model.
        quantization: Quantization of the base model.
        what: Name of the prefix.
    """
    pair = ours.get("weights"), base.get("weights")
    if pair in _WARNED:
        return
    _WARNED.add(pair)
    parts = [f"{n} numbers of {kind} differ by {error:.1%}" for kind, (error, n) in _errors(ours, base).items()]
    checked = "; ".join(parts) or "its weights were not compared, since the prefix holds no numbers of its own base's"
    logger.warning(
        "%s was made for other weights than this base's (%s), and its results can differ: config and adapters are "
        "equal; %s; the layers between the first and the last were not compared",
        what,
        quantization,
        checked,
    )


def _errors(ours: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    """Relative error of the numbers that two fingerprints have in common, and their count, by kind."""
    found = {}
    for kind in KINDS:
        theirs, mine = ((f.get("sample") or {}).get(kind) or {} for f in (ours, base))
        pairs = [(_numbers(theirs[name]), _numbers(mine[name])) for name in sorted({*theirs} & {*mine})]
        if pairs:
            a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
            size = float(np.linalg.norm(a))
            found[kind] = (float(np.linalg.norm(a - b)) / size if size else float("inf") if b.any() else 0.0, len(a))
    return found


def _numbers(text: str) -> NDArray[np.float64]:
    """Numbers of a parameter; NaN for a damaged text."""
    try:
        data = np.frombuffer(base64.b64decode(text, validate=True), "<u2")
    except (binascii.Error, ValueError):
        data = np.empty(0, "<u2")
    if len(data) != NUMBERS:
        return np.full(NUMBERS, np.nan)
    return (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
