"""PEFT adapter folders of type LORA: their tensors, and the fields of the configuration that change the result.

Source:
    PEFT 0.21.2, ``LoraConfig`` in ``tuners/lora/config.py`` and ``save_pretrained`` in ``peft_model.py``.
    tests/unit/prefix/test_lora_format.py checks folders in both directions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError, shown
from prefixfast.io.untrusted import read_json, read_tensors
from prefixfast.prefix.peft_format import COMMON_CONFIG, CONFIG, WEIGHTS
from prefixfast.prefix.peft_read import base_name

if TYPE_CHECKING:
    from torch import Tensor

OUTER = "base_model.model."  # PEFT's prefix of every name
NAME = re.compile(re.escape(OUTER) + r"(.+)\.lora_([AB])\.weight")
PLAIN_PATTERN = re.compile(
    r"[\w.^$\\-]+"
)  # keys of patterns without repetition, which PEFT takes as regular expressions
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")  # initial values that leave the base as it is
# Fields that do not change the result of a trained adapter. Target modules are those of the tensors.
HARMLESS = frozenset(
    {
        *COMMON_CONFIG,
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "qalora_group_size",
        "runtime_config",
        "target_modules",
    }
) - {"modules_to_save"}
NUMBERS: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float)}
FLAGS = ("fan_in_fan_out", "use_rslora")
PATTERNS: dict[str, tuple[type, ...]] = {"rank_pattern": (int,), "alpha_pattern": (int, float)}


class LoraFolder(NamedTuple):
    """Content of an adapter folder.

    Attributes:
        tensors: Tensors by PEFT's names without ``base_model.model.``.
        fields: Fields of the configuration that change the result.
        base_name: Name of the base model, None if the adapter does not say it.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, JSON]
    base_name: str | None


def lora_files(tensors: Mapping[str, Tensor], fields: Mapping[str, JSON], name: str | None) -> dict[str, bytes]:
    """Files of an adapter folder by name.

    Args:
        tensors: Tensors by PEFT's names without ``base_model.model.``.
        fields: Fields of the configuration that change the result.
        name: Name of the base model, None if unknown.
    """
    from safetensors.torch import save

    common = {key: value for key, value in COMMON_CONFIG.items() if key != "num_transformer_submodules"}
    config = {**common, "peft_type": "LORA", "base_model_name_or_path": name or None, **fields}
    outer = {OUTER + n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    return {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS: save(outer, metadata={"format": "pt"}),
    }


def read_lora(folder: Path) -> LoraFolder:
    """Read an adapter folder, which may come from anywhere.

    Raises:
        DataError: If the folder holds no LoRA adapter of linear layers, or a file is damaged.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA" or config.get("task_type") not in ("CAUSAL_LM", None):
        got = f"{shown(config.get('peft_type'))} and {shown(config.get('task_type'))}"
        msg = f"{CONFIG}: expected peft_type LORA and task_type CAUSAL_LM, got {got}"
        raise DataError(msg, path=str(path))
    tensors = _read_tensors(folder)
    fields = _read_fields(config, path)
    fields["target_modules"] = sorted({n.rsplit(".", 2)[0] for n in tensors})
    return LoraFolder(tensors, fields, base_name(config, path))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of an adapter, which must be pairs of finite matrices."""
    path = folder / WEIGHTS
    tensors = read_tensors(path)
    for name, t in tensors.items():
        if not NAME.fullmatch(name):
            msg = f"{WEIGHTS}: {shown(name)}: expected the weights lora_A and lora_B of linear layers alone"
            raise DataError(msg, path=str(path))
        if t.ndim != 2 or not t.is_floating_point() or t.dtype.itemsize < 2 or not bool(t.isfinite().all()):
            msg = f"{WEIGHTS}: {shown(name)}: expected a matrix of finite numbers, got {t.dtype} {list(t.shape)}"
            raise DataError(msg, path=str(path))
    inner = {name.removeprefix(OUTER): t for name, t in tensors.items()}
    layers = {part: {n.removesuffix(f".lora_{part}.weight") for n in inner if f".lora_{part}." in n} for part in "AB"}
    if not inner or layers["A"] != layers["B"]:
        msg = f"{WEIGHTS}: expected lora_A and lora_B of each layer, got {len(layers['A'])} and {len(layers['B'])}"
        raise DataError(msg, path=str(path))
    return inner


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, JSON]:
    """Fields that change the result; a field that is not known to be computed right is refused."""
    fields: dict[str, JSON] = {}
    if config.get("init_lora_weights") not in INITIAL:
        got = shown(config["init_lora_weights"])
        msg = f"{CONFIG}: init_lora_weights {got} changes the base model itself, which is not read from an adapter"
        raise DataError(msg, path=str(path))
    for name, value in config.items():
        if name in HARMLESS or value in (None, False, "none") or value in ([], {}):
            continue
        is_number = name in NUMBERS and _is_positive(value, NUMBERS[name])
        is_right = is_number or (name in FLAGS and value is True) or (name in PATTERNS and _is_pattern(name, value))
        if not is_right:
            known = ", ".join((*NUMBERS, *FLAGS, *PATTERNS))
            msg = f"{CONFIG}: {shown(name)}: {shown(value)} is not read; expected values of {known} alone"
            raise DataError(msg, path=str(path))
        fields[name] = value
    if missing := [name for name in NUMBERS if name not in fields]:
        msg = f"{CONFIG}: expected {' and '.join(missing)}, got none"
        raise DataError(msg, path=str(path))
    return fields


def _is_pattern(name: str, value: Any) -> bool:
    """Whether a value maps names of layers to numbers."""
    return isinstance(value, dict) and all(
        PLAIN_PATTERN.fullmatch(key) and _is_positive(number, PATTERNS[name]) for key, number in value.items()
    )


def _is_positive(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and bool(0 < value < math.inf)
