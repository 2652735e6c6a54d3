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
CAUSAL_TASK, SEQ2SEQ_TASK = TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
ALL_LINEAR = "all-linear"  # PEFT's name of all linear layers but the output layer
# Fields that select layers. An adapter of PEFT has those of its tensors.
SELECTORS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Fields that do not change the result of a trained adapter.
HARMLESS = frozenset(
    {
        *COMMON_CONFIG,
        *SELECTORS,
        "base_model_name_or_path",
        "eva_config",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "qalora_group_size",
        "runtime_config",
        "task_type",
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
        written: Fields that change the result, with the selection of layers as the configuration writes it.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, JSON]
    base_name: str | None
    written: dict[str, JSON]


def lora_files(
    tensors: Mapping[str, Tensor], fields: Mapping[str, JSON], name: str | None, *, is_seq2seq: bool = False
) -> dict[str, bytes]:
    """Files of an adapter folder by name.

    Args:
        tensors: Tensors by PEFT's names without ``base_model.model.``.
        fields: Fields of the configuration that change the result.
        name: Name of the base model, None if unknown.
        is_seq2seq: Whether the base model is an encoder-decoder model.
    """
    from safetensors.torch import save

    task = SEQ2SEQ_TASK if is_seq2seq else CAUSAL_TASK
    config = {
        **COMMON_CONFIG,
        "task_type": task,
        "peft_type": "LORA",
        "base_model_name_or_path": name or None,
        **fields,
    }
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
    if config.get("peft_type") != "LORA" or config.get("task_type") not in (*TASK_TYPES, None):
        got = f"{shown(config.get('peft_type'))} and {shown(config.get('task_type'))}"
        msg = f"{CONFIG}: expected peft_type LORA and task_type {' or '.join(TASK_TYPES)}, got {got}"
        raise DataError(msg, path=str(path))
    tensors = _read_tensors(folder)
    try:
        fields, written = result_fields(config), written_options(config)
    except DataError as e:
        msg = f"{CONFIG}: {e}"
        raise DataError(msg, path=str(path)) from e
    fields["target_modules"] = sorted({n.rsplit(".", 2)[0] for n in tensors})
    return LoraFolder(tensors, fields, base_name(config, path), written)


def check_options(options: Mapping[str, JSON]) -> None:
    """Check the options of LoRA weights, which PEFT gets as fields of its configuration.

    Raises:
        DataError: If one is unknown, missing or wrong.
    """
    targets = options.get("target_modules")
    is_list = isinstance(targets, list) and bool(targets) and all(isinstance(t, str) and t for t in targets)
    try:
        if targets != ALL_LINEAR and not is_list:
            msg = f"target_modules: expected names of layers or {ALL_LINEAR!r}, got {shown(targets)}"
            raise DataError(msg)
        if unknown := set(options) - {*result_fields(options), "target_modules"}:
            name = min(unknown)
            msg = f"{shown(name)}: {shown(options[name])} is no option of LoRA; leave it out"
            raise DataError(msg)
    except DataError as e:
        msg = f"options: {e}"
        raise DataError(msg) from e


def written_options(fields: Mapping[str, Any]) -> dict[str, JSON]:
    """Fields that change the result, with those that select layers. Names of layers are sorted, as PEFT's are a set.

    Raises:
        DataError: If a field is not known to be computed right.
    """
    chosen = {name: fields[name] for name in SELECTORS if fields.get(name) not in (None, [], {})}
    if isinstance(names := chosen.get("target_modules"), list):
        chosen["target_modules"] = sorted(map(str, names))
    return result_fields(fields) | chosen


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


def result_fields(config: Mapping[str, Any]) -> dict[str, JSON]:
    """Fields of a configuration that change the result, without those that select layers.

    Raises:
        DataError: If a field is not known to be computed right.
    """
    fields: dict[str, JSON] = {}
    if config.get("init_lora_weights") not in INITIAL:
        got = shown(config["init_lora_weights"])
        msg = f"init_lora_weights {got} changes the base model itself, which is not read from an adapter"
        raise DataError(msg)
    for name, value in config.items():
        if name in HARMLESS or value in (None, False, "none") or value in ([], {}):
            continue
        is_number = name in NUMBERS and _is_positive(value, NUMBERS[name])
        is_right = is_number or (name in FLAGS and value is True) or (name in PATTERNS and _is_pattern(name, value))
        if not is_right:
            known = ", ".join((*NUMBERS, *FLAGS, *PATTERNS))
            msg = f"{shown(name)}: {shown(value)} is not read; expected values of {known} alone"
            raise DataError(msg)
        fields[name] = value
    if missing := [name for name in NUMBERS if name not in fields]:
        msg = f"expected {' and '.join(missing)}, got none"
        raise DataError(msg)
    return fields


def _is_pattern(name: str, value: Any) -> bool:
    """Whether a value maps names of layers to numbers."""
    return isinstance(value, dict) and all(
        PLAIN_PATTERN.fullmatch(key) and _is_positive(number, PATTERNS[name]) for key, number in value.items()
    )


def _is_positive(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and bool(0 < value < math.inf)
